"""Images made larger, and cut."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import Handler, ints


def _sizes(x: Tensor, height: Tensor, width: Tensor) -> list[int]:
    return [floor(float(height) * x.shape[-2]), floor(float(width) * x.shape[-1])]


def upsample_nearest_neighbor(
    math: Arithmetic, *, x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor
) -> Tensor:
    sizes = _sizes(x, scale_factor_height, scale_factor_width)
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.interpolate(flat, sizes, mode="nearest").reshape(*x.shape[:-2], *sizes)


def upsample_bilinear(
    math: Arithmetic,
    *,
    x: Tensor,
    scale_factor_height: Tensor,
    scale_factor_width: Tensor,
    align_corners: Tensor,
    half_pixel_centers: Tensor | None = None,
) -> Tensor:
    """Interpolate with the scale that the sizes give, as MIL has it.

    ``half_pixel_centers`` (iOS 16) is torch's own choice unless it is given; with
    ``align_corners`` it says nothing.
    """
    corners = bool(align_corners)
    if half_pixel_centers is not None and bool(half_pixel_centers) == corners:
        raise ValueError(
            f"half_pixel_centers and align_corners are both {corners}; expected one of them"
        )
    sizes = _sizes(x, scale_factor_height, scale_factor_width)
    flat = x.reshape(-1, 1, *x.shape[-2:])
    larger = F.interpolate(flat, sizes, mode="bilinear", align_corners=corners)
    return larger.reshape(*x.shape[:-2], *sizes)


def crop(math: Arithmetic, *, x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "crop": crop,
        "upsample_bilinear": upsample_bilinear,
        "upsample_nearest_neighbor": upsample_nearest_neighbor,
    }
)
