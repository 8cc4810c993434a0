"""An image input as an app has it: channels last, or 8-bit pixels with the preprocessing inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.core.pixels import Pixels
from flowexport.core.types import TensorSpec
from flowexport.targets.tflite.options import TFLiteOptions

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class ImageEnd:
    """What the file takes in place of the model's float32 (1, channels, height, width).

    Attributes:
        spec: of the file's input.
        layout: ``nchw`` or ``nhwc``.
        pixels: how uint8 pixels become the model's values; None where the file takes those.
    """

    spec: TensorSpec
    layout: str
    pixels: Pixels | None

    def inside(self, x: Tensor) -> Tensor:
        """Return the model's input from the file's, as operators of the graph."""
        if self.pixels is not None:
            # (p * step + low - mean) / std as one product and one sum a channel.
            std = np.asarray(self.pixels.std)
            scale = self.pixels.step / std
            bias = (self.pixels.low - np.asarray(self.pixels.mean)) / std
            shape = (-1,) if self.layout == "nhwc" else (-1, 1, 1)
            factor, offset = (
                torch.tensor(v, dtype=torch.float32).reshape(shape) for v in (scale, bias)
            )
            x = x.to(torch.float32) * factor + offset
        return x.permute(_TO_FIRST) if self.layout == "nhwc" else x

    def feed(self, value: np.ndarray, where: str) -> np.ndarray:
        """Return the file's input from the model's.

        Raises:
            InputError: the file takes pixels and a value is none.
        """
        if self.pixels is not None:
            value = self.pixels.whole(value, where)
        return np.ascontiguousarray(value.transpose(_TO_LAST) if self.layout == "nhwc" else value)

    def to_json(self) -> dict[str, Any]:
        pixels = None if self.pixels is None else self.pixels.to_json()
        return {"input": self.spec.to_json(), "layout": self.layout, "preprocessing": pixels}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageEnd:
        pixels: Pixels | None = None
        if (found := data["preprocessing"]) is not None:
            low, high = map(float, found["range"])
            pixels = Pixels(low, high, tuple(found["mean"]), tuple(found["std"]))
        return cls(TensorSpec.from_json(data["input"]), str(data["layout"]), pixels)


def image_end(
    inputs: Sequence[TensorSpec],
    preprocessing: Mapping[str, Any],
    settings: TFLiteOptions,
    where: str,
) -> ImageEnd | None:
    """Return what the settings ask of the one image input, or None.

    Raises:
        InputError: there are several inputs, or this one is no image.
    """
    if not settings.image:
        return None
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        have = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in inputs)
        raise InputError(
            f"{where}: layout {settings.layout} and input_dtype {settings.input_dtype} are asked"
            f" for, but the inputs are {have}; expected one image,"
            " batch x channels x height x width.",
            fix="leave layout and input_dtype out",
        )
    (spec,) = inputs
    uint8 = settings.input_dtype == "uint8"
    pixels = Pixels.of(preprocessing, spec, where) if uint8 else None
    order = _TO_LAST if settings.layout == "nhwc" else range(4)
    shape = tuple(spec.static(batch=1).shape[i] for i in order)
    return ImageEnd(TensorSpec(spec.name, shape, settings.input_dtype), settings.layout, pixels)
