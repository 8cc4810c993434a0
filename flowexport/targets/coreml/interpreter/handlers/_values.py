"""What handlers share: types, and small readings of constant inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Handler = Callable[..., Any]
"""``handler(arithmetic, **inputs)``: inputs by their MIL names, tensors or strings;
returns one value or, for an operator of several results, a tuple."""

TORCH_TYPES: dict[str, torch.dtype] = {
    "float16": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
"""Storage type -> the torch type that carries it; uint16 has few torch kernels."""

MIL_NAMES = {
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "float": "float32",
    "half": "float16",
    "double": "float64",
}


def torch_type(mil_name: str) -> torch.dtype:
    """Return the carrying torch type of ``fp16``, ``int32``, ``bool`` ..."""
    return TORCH_TYPES[MIL_NAMES.get(mil_name, mil_name)]


def ints(value: Tensor) -> list[int]:
    """Return an integer vector (or scalar) as a list."""
    return [int(v) for v in value.reshape(-1).tolist()]


def axes_of(axes: Tensor | None, x: Tensor) -> list[int]:
    """Return reduction axes as non-negative numbers; None means all."""
    return list(range(x.dim())) if axes is None else sorted(a % x.dim() for a in ints(axes))


def require(condition: bool, message: str) -> None:
    """Raise ValueError (which the interpreter reports with the operator's place)."""
    if not condition:
        raise ValueError(message)
