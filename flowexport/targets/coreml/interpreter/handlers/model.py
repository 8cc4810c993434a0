"""What only models have: quantized activations, states, the classifier, compressed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import Handler, require, torch_type


@dataclass
class StateCell:
    """One state's content between runs."""

    value: Tensor


def read_state(math: Arithmetic, *, input: StateCell) -> Tensor:
    return input.value


def update_state(math: Arithmetic, *, state: StateCell, value: Tensor) -> Tensor:
    require(
        state.value.shape == value.shape and state.value.dtype == value.dtype,
        f"state is {tuple(state.value.shape)} {state.value.dtype}; expected the value's type",
    )
    state.value = math.stored(value)
    return state.value


def _along(x: Tensor, vector: Tensor, axis: Tensor | None) -> Tensor:
    if vector.dim() == 0:
        return vector
    require(axis is not None, "a vector scale without an axis")
    dim = int(axis) % x.dim()  # type: ignore[arg-type]
    return vector.reshape([-1 if d == dim else 1 for d in range(x.dim())])


def quantize(
    math: Arithmetic,
    *,
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    wanted = torch_type(output_dtype)
    limits = torch.iinfo(wanted)
    steps = torch.round(input / _along(input, scale, axis))
    if zero_point is not None:
        steps = steps + _along(input, zero_point.float(), axis)
    return steps.clamp(limits.min, limits.max).to(wanted)


def dequantize(
    math: Arithmetic,
    *,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    steps = input.to(scale.dtype)
    if zero_point is not None:
        steps = steps - _along(input, zero_point.to(scale.dtype), axis)
    return steps * _along(input, scale, axis)


def classify(
    math: Arithmetic, *, probabilities: Tensor, classes: Sequence[Any]
) -> tuple[Any, dict[Any, float]]:
    flat = probabilities.reshape(-1)
    require(flat.numel() == len(classes), f"{flat.numel()} probabilities of {len(classes)} classes")
    names = [c if isinstance(c, str) else int(c) for c in classes]
    return names[int(torch.argmax(flat))], dict(zip(names, flat.tolist(), strict=True))


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "classify": classify,
        "coreml_update_state": update_state,
        "dequantize": dequantize,
        "quantize": quantize,
        "read_state": read_state,
    }
)


def _decompress(operation: Any) -> Any:
    """Return the dense array(s) by coremltools' own decompression of the stored data."""
    return operation.materialized_val_inference()


CONSTEXPR: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "constexpr_affine_dequantize": _decompress,
        "constexpr_blockwise_shift_scale": _decompress,
        "constexpr_cast": _decompress,
        "constexpr_lut_to_dense": _decompress,
        "constexpr_lut_to_sparse": _decompress,
        "constexpr_sparse_blockwise_shift_scale": _decompress,
        "constexpr_sparse_to_dense": _decompress,
    }
)
"""Compressed weights, expanded once when the package is loaded."""
