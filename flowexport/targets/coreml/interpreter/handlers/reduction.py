"""Reductions, prefix sums and orderings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import (
    Handler,
    axes_of,
    require,
    torch_type,
)

Reduce = Callable[[Arithmetic, Tensor, list[int], bool], Tensor]


def _reduction(compute: Reduce) -> Handler:
    def handler(
        math: Arithmetic, *, x: Tensor, axes: Tensor | None = None, keep_dims: Tensor
    ) -> Tensor:
        return compute(math, x, axes_of(axes, x), bool(keep_dims))

    return handler


def _prod(math: Arithmetic, x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _log_sum_exp(math: Arithmetic, x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not math.narrow:
        return torch.logsumexp(x, axes, keepdim=keep)
    peak = x.amax(axes, keepdim=True)
    total = torch.log(math.sum(torch.exp(x - peak), axes, True)) + peak
    return total if keep else total.amax(axes)


def _arg(choose: Callable[..., Tensor]) -> Handler:
    def handler(
        math: Arithmetic,
        *,
        x: Tensor,
        axis: Tensor,
        keep_dims: Tensor,
        output_dtype: str = "int32",
    ) -> Tensor:
        return choose(x, int(axis), keepdim=bool(keep_dims)).to(torch_type(output_dtype))

    return handler


def cumsum(
    math: Arithmetic, *, x: Tensor, axis: Tensor, exclusive: Tensor, reverse: Tensor
) -> Tensor:
    dim = int(axis) % x.dim()
    values = x.flip(dim) if bool(reverse) else x
    total = math.cumsum(values, dim)
    if bool(exclusive):
        total = torch.cat([torch.zeros_like(total.narrow(dim, 0, 1)), total], dim).narrow(
            dim, 0, x.shape[dim]
        )
    return total.flip(dim) if bool(reverse) else total


def topk(
    math: Arithmetic,
    *,
    x: Tensor,
    k: Tensor,
    axis: Tensor,
    ascending: Tensor,
    sort: Tensor | None = None,
    return_indices: Tensor | None = None,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    count = int(k)
    require(count > 0, f"k is {count}; expected > 0")
    values, indices = torch.topk(x, count, int(axis), largest=not bool(ascending))
    if return_indices is not None and not bool(return_indices):
        return values
    return values, indices.to(torch_type(output_indices_dtype))


def argsort(math: Arithmetic, *, x: Tensor, axis: Tensor, ascending: Tensor) -> Tensor:
    return torch.argsort(x, stable=True, dim=int(axis), descending=not bool(ascending)).int()


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "argsort": argsort,
        "cumsum": cumsum,
        "reduce_argmax": _arg(torch.argmax),
        "reduce_argmin": _arg(torch.argmin),
        "reduce_l1_norm": _reduction(lambda m, x, a, k: m.sum(x.abs(), a, k)),
        "reduce_l2_norm": _reduction(lambda m, x, a, k: m.sum(x * x, a, k).sqrt()),
        "reduce_log_sum": _reduction(lambda m, x, a, k: m.sum(x, a, k).log()),
        "reduce_log_sum_exp": _reduction(_log_sum_exp),
        "reduce_max": _reduction(lambda m, x, a, k: x.amax(a, keepdim=k)),
        "reduce_mean": _reduction(lambda m, x, a, k: m.mean(x, a, k)),
        "reduce_min": _reduction(lambda m, x, a, k: x.amin(a, keepdim=k)),
        "reduce_prod": _reduction(_prod),
        "reduce_sum": _reduction(lambda m, x, a, k: m.sum(x, a, k)),
        "reduce_sum_square": _reduction(lambda m, x, a, k: m.sum(x * x, a, k)),
        "topk": topk,
    }
)
