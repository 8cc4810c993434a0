"""A causal model's programs: ``forward`` at static lengths, and ``step`` with its state."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowexport.core.errors import InputError
from flowexport.core.types import FORWARD, STEP, Precision, TensorSpec
from flowexport.lowering.lengths import forward_name, lower_each
from flowexport.lowering.program import LoweredProgram, lower
from flowexport.ops.descriptor import AttentionDescriptor

NEXT = "next_"
"""Prefix of the output that is a state input's next value."""


@runtime_checkable
class StreamingModule(Protocol):
    """What a causal module has beside ``forward``; see ``flowexport_models.streaming``."""

    max_steps: int | None

    def state_specs(self) -> tuple[TensorSpec, ...]: ...

    def initial_state(self, batch: int = 1, dtype: torch.dtype = ...) -> dict[str, Tensor]: ...

    def step(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]: ...


class _Step(nn.Module):
    """``step`` with the state as inputs and outputs, in the order of its specs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        assert isinstance(model, StreamingModule)
        self.model = model
        self.names = [s.name for s in model.state_specs()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(self.names, inputs[1:], strict=True))
        result, following = self.model.step(inputs[0], state)
        return (result, *(following[n] for n in self.names))


def check_streaming(
    module: Any,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str],
    lengths: Sequence[int],
    where: str,
) -> None:
    """Refuse a model or lengths that cannot be exported step by step.

    Raises:
        InputError: the module has no ``step``, its ends are not one sequence in and one out,
            or a length is dynamic or beyond the model's longest stream.
    """
    if not isinstance(module, StreamingModule):
        raise InputError(
            f"{where}: streaming is asked for, but {type(module).__name__} has no step with a"
            " state; expected a causal model.",
            fix="drop `streaming`, or give the module state_specs, initial_state and step",
        )
    if len(inputs) != 1 or len(output_names) != 1 or len(inputs[0].shape) < 2:
        names = ", ".join(s.name for s in inputs)
        raise InputError(
            f"{where}: a causal model has the inputs {names} and the outputs"
            f" {', '.join(output_names)}; expected one sequence (batch, steps, ...) and one output."
        )
    (sequence,) = inputs
    if isinstance(sequence.shape[1], str):
        raise InputError(
            f"{where}: {sequence.name} has the dynamic length {sequence.shape[1]!r}; expected a"
            " fixed one.",
            fix="give each length a bucket of its own: `streaming: {lengths: [32, 1024]}`",
        )
    for length in (sequence.shape[1], *lengths):
        if module.max_steps is not None and length > module.max_steps:
            raise InputError(
                f"{where}: {sequence.name} has length {length};"
                f" expected at most {module.max_steps}, the model's longest stream."
            )


def lower_streaming(
    model: nn.Module,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str],
    *,
    lengths: Sequence[int] = (),
    name: str,
    ops: Sequence[AttentionDescriptor],
    precision: Precision = Precision.FP32,
    **carried: Any,
) -> LoweredProgram:
    """Export a causal model: ``forward``, ``forward_<length>`` for more lengths, and ``step``.

    Args:
        model: with ``step``, ``state_specs`` and ``initial_state``.
        inputs: one, (batch, L, ...); L is the length of ``forward``.
        output_names: one.
        lengths: more lengths of forward.
        precision: FP32; see Raises.
        carried: labels, preprocessing and recipe_sha256, as :func:`lower` has them.

    Returns:
        The program of ``forward``, the others in its ``functions``.

    Raises:
        InputError: as :func:`check_streaming`; or the precision is FP16, in which a state's
            sums stop growing after about 2,000 steps.
        LoweringError: ``torch.export`` refused the model.
    """
    check_streaming(model, inputs, output_names, lengths, f"lower {name}")
    if precision is not Precision.FP32:
        raise InputError(
            f"lower {name}: streaming has precision {precision.value}; expected fp32: the state's"
            " sums stop growing in half after about 2,000 steps.",
            fix="--precision fp32",
        )
    (sequence,) = inputs

    def at(length: int) -> list[TensorSpec]:
        return [replace(sequence, shape=(sequence.shape[0], length, *sequence.shape[2:]))]

    frame = replace(sequence, shape=(sequence.shape[0], *sequence.shape[2:]))
    assert isinstance(model, StreamingModule)
    state = model.state_specs()
    step = lower(
        _Step(copy.deepcopy(model)),
        [frame, *state],
        [*output_names, *(NEXT + s.name for s in state)],
        name=name,
        ops=ops,
        **carried,
    )
    step = replace(step, state={s.name: NEXT + s.name for s in state})
    first = int(sequence.shape[1])
    shapes = {FORWARD: at(first), **{forward_name(n): at(n) for n in lengths if n != first}}
    forwards = lower_each(model, shapes, output_names, name=name, ops=ops, **carried)
    return replace(forwards.pop(FORWARD), functions={**forwards, STEP: step})
