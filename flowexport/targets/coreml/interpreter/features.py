"""Feeds and results at the package's border: arrays, images, labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.targets.coreml.interpreter.handlers import TORCH_TYPES
from flowexport.targets.coreml.interpreter.program import Declared, Feature


def feed_tensor(feature: Feature, value: Any, where: str) -> Tensor:
    """Return a feed as the program's tensor.

    Raises:
        InputError: dtype or shape is not what the description allows.
    """
    array = np.asarray(value)
    if feature.kind == "image" and array.dtype == np.uint8 and array.ndim in (2, 3):
        array = _image(feature, array, where)
    if array.dtype.name != feature.dtype:
        raise InputError(
            f"{where}: {feature.name} has dtype {array.dtype.name}; expected {feature.dtype}."
        )
    if not feature.allows(array.shape):
        sizes = "x".join(map(str, array.shape)) or "scalar"
        raise InputError(
            f"{where}: {feature.name} has shape {sizes}; expected {feature.expected()}."
        )
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    return torch.from_numpy(array).to(TORCH_TYPES[array.dtype.name])


def _image(feature: Feature, array: np.ndarray, where: str) -> np.ndarray:
    """Return RGB or grey pixels as (1, channels, height, width) float32, 0 to 255."""
    pixels = array[:, :, None] if array.ndim == 2 else array
    if pixels.shape[2] != feature.shape[1]:
        raise InputError(
            f"{where}: {feature.name} has {pixels.shape[2]} channels; expected {feature.shape[1]}."
        )
    if feature.color == "BGR":
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]).astype(np.float32)


def result_array(feature: Feature, declared: Declared | None, value: Any) -> Any:
    """Return an output as the description types it."""
    if not isinstance(value, Tensor):
        return value
    dtype = declared.dtype if declared is not None else feature.dtype
    return value.numpy().astype(dtype, copy=False)
