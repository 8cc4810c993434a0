"""Cases of the interpreter's larger operators: recurrent, transposed, resizing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coreml_interpreter_cases import IMAGE, Case
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from torch import nn

_RNG = np.random.default_rng(17)


def _f(*shape: int) -> np.ndarray:
    return _RNG.uniform(-1, 1, shape).astype(np.float32)


def _t(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)


TAPS, SHIFT, GROUPED = _f(4, 3, 3, 2), _f(3), _f(4, 2, 2)
LINE = _f(2, 4, 5)
STEPS, BATCH, SIZE, HIDDEN = 4, 2, 3, 5
SEQUENCE, H0, C0 = _f(STEPS, BATCH, SIZE), _f(BATCH, HIDDEN), _f(BATCH, HIDDEN)
INTO, BACK, BIAS = _f(2, 4 * HIDDEN, SIZE), _f(2, 4 * HIDDEN, HIDDEN), _f(2, 4 * HIDDEN)


def _gates(values: np.ndarray) -> torch.Tensor:
    """Return MIL's gates (input, forget, output, cell) in torch's order."""
    i, f, o, z = np.split(values, 4)
    return _t(np.concatenate([i, f, z, o]))


def _lstm(direction: str, sequence: bool) -> Case:
    both = direction == "bidirectional"
    h0, c0 = (np.concatenate([v, -v], 1) if both else v for v in (H0, C0))

    def make(x: Any, h: Any, c: Any) -> Any:
        more = {"weight_ih_back": INTO[1], "weight_hh_back": BACK[1], "bias_back": BIAS[1]}
        return mb.lstm(
            x=x, initial_h=h, initial_c=c, weight_ih=INTO[0], weight_hh=BACK[0], bias=BIAS[0],
            direction=direction, output_sequence=sequence, **(more if both else {}),
        )  # fmt: skip

    def want(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer = nn.LSTM(SIZE, HIDDEN, bidirectional=both)
        with torch.no_grad():
            for way, suffix in enumerate(("", "_reverse") if both else ("",)):
                getattr(layer, f"weight_ih_l0{suffix}").copy_(_gates(INTO[way]))
                getattr(layer, f"weight_hh_l0{suffix}").copy_(_gates(BACK[way]))
                getattr(layer, f"bias_ih_l0{suffix}").copy_(_gates(BIAS[way]))
                getattr(layer, f"bias_hh_l0{suffix}").zero_()
            turned = x.flip(0) if direction == "reverse" else x
            states = [torch.stack(v.chunk(2, 1) if both else [v]) for v in (h, c)]
            rows, (last, cell) = layer(turned, tuple(states))
            rows = rows.flip(0) if direction == "reverse" else rows
            last, cell = (torch.cat(list(v), -1) for v in (last, cell))
        return (rows if sequence else last[None]), last, cell

    note = f"{direction}{', every step' if sequence else ''}"
    return Case("lstm", (SEQUENCE, h0, c0), make, want, note)


LAYERS = [
    Case("conv_transpose", (IMAGE,), lambda a: mb.conv_transpose(
             x=a, weight=TAPS, bias=SHIFT, strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0]),
         lambda a: F.conv_transpose2d(a, _t(TAPS), _t(SHIFT), (2, 3), (1, 0)), "strided, padded"),
    Case("conv_transpose", (LINE,), lambda a: mb.conv_transpose(
             x=a, weight=GROUPED, strides=[2], dilations=[2], groups=2, pad_type="valid"),
         lambda a: F.conv_transpose1d(a, _t(GROUPED), None, 2, groups=2, dilation=2), "grouped"),
    Case("conv_transpose", (IMAGE,), lambda a: mb.conv_transpose(
             x=a, weight=TAPS, bias=SHIFT, strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 0],
             output_shape=[2, 3, 14, 12]),
         lambda a: F.conv_transpose2d(a, _t(TAPS), _t(SHIFT), 2, (1, 0), (1, 0)), "output shape"),
    Case("crop", (IMAGE,), lambda a: mb.crop(x=a, crop_height=[1, 2], crop_width=[0, 3]),
         lambda a: a[..., 1:-2, :-3]),
    Case("upsample_nearest_neighbor", (IMAGE,), lambda a: mb.upsample_nearest_neighbor(
             x=a, scale_factor_height=3, scale_factor_width=2),
         lambda a: F.interpolate(a, scale_factor=(3, 2))),
    Case("upsample_bilinear", (IMAGE,), lambda a: mb.upsample_bilinear(
             x=a, scale_factor_height=2, scale_factor_width=3, align_corners=False),
         lambda a: F.interpolate(a, scale_factor=(2, 3), mode="bilinear"), "centres"),
    Case("upsample_bilinear", (IMAGE,), lambda a: mb.upsample_bilinear(
             x=a, scale_factor_height=2, scale_factor_width=2, align_corners=True),
         lambda a: F.interpolate(a, scale_factor=2, mode="bilinear", align_corners=True),
         "corners"),
    _lstm("forward", True),
    _lstm("reverse", False),
    _lstm("bidirectional", True),
]  # fmt: skip


MODULES: dict[str, tuple[nn.Module, tuple[int, ...], set[str]]] = {
    "ConvTranspose2d": (
        nn.ConvTranspose2d(4, 3, 3, 2, padding=1, output_padding=1),
        (1, 4, 5, 4),
        {"conv_transpose"},
    ),
    "Upsample, nearest": (nn.Upsample(scale_factor=2), (1, 2, 4, 3), {"upsample_nearest_neighbor"}),
    "Upsample, bilinear": (
        nn.Upsample(scale_factor=2, mode="bilinear"),
        (1, 2, 4, 3),
        {"upsample_bilinear"},
    ),
}
"""What torch users write -> module, input's shape, operators that the package must hold.

coremltools refuses an exported ``nn.LSTM``; its own ``lstm`` comes from traced models.
"""
