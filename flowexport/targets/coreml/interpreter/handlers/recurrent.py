"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import Handler, require

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"linear": lambda x: x, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
)


def lstm(
    math: Arithmetic,
    *,
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str,
    output_sequence: Tensor,
    recurrent_activation: str,
    cell_activation: str,
    activation: str,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the gates i, f, o, z of MIL over x (steps, batch, size)."""
    require(peephole is None and peephole_back is None, "has a peephole; expected none")
    require(clip is None, "has a clip; expected none")
    names = (recurrent_activation, cell_activation, activation)
    unknown = [n for n in names if n not in _ACTIVATIONS]
    require(not unknown, f"has activation {unknown}; expected {', '.join(_ACTIVATIONS)}")
    gate, cell, out = (_ACTIVATIONS[n] for n in names)

    def run(
        steps: Tensor, h: Tensor, c: Tensor, into: Tensor, back: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = []
        for frame in steps:
            total = math.matmul(frame, into.T) + math.matmul(h, back.T)
            total = total if shift is None else total + shift
            i, f, o, z = total.chunk(4, dim=-1)
            c = gate(f) * c + gate(i) * cell(z)
            h = gate(o) * out(c)
            rows.append(h)
        return torch.stack(rows), h, c

    if direction != "bidirectional":
        reverse = direction == "reverse"
        steps = x.flip(0) if reverse else x
        rows, h, c = run(steps, initial_h, initial_c, weight_ih, weight_hh, bias)
        rows = rows.flip(0) if reverse else rows
        return (rows if bool(output_sequence) else h.unsqueeze(0)), h, c
    assert weight_ih_back is not None and weight_hh_back is not None
    (h0, h1), (c0, c1) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    ahead, h0, c0 = run(x, h0, c0, weight_ih, weight_hh, bias)
    behind, h1, c1 = run(x.flip(0), h1, c1, weight_ih_back, weight_hh_back, bias_back)
    rows = torch.cat([ahead, behind.flip(0)], -1)
    h, c = torch.cat([h0, h1], -1), torch.cat([c0, c1], -1)
    return (rows if bool(output_sequence) else h.unsqueeze(0)), h, c


HANDLERS: Mapping[str, Handler] = MappingProxyType({"lstm": lstm})
