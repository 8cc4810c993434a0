"""Sums and products of an accumulator in half precision: what the narrowest devices do.

Half values travel as float32 tensors. Sequential sums and chunks of products are
the pessimistic end; a device with a wider or a tree-shaped accumulator is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MATMUL_CHUNK = 32
"""Products added in float32 before each float16 addition: a dot unit's width."""


def half_sum(x: Tensor, axes: Sequence[int], keep: bool = False) -> Tensor:
    """Sum over ``axes`` one by one in memory order, each partial sum rounded to float16."""
    summed = sorted(a % x.dim() for a in axes)
    kept = [d for d in range(x.dim()) if d not in summed]
    shape = [x.shape[d] for d in kept]
    terms = x.permute(*summed, *kept).reshape(-1, *shape).half()
    total = torch.zeros(shape, dtype=torch.float16)
    for term in terms:
        total += term
    result = total.float()
    if not keep:
        return result
    return result.reshape([1 if d in summed else s for d, s in enumerate(x.shape)])


def half_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiply (..., n, k) by (..., k, m); chunks of k are added in float16."""
    depth = x.shape[-1]
    if depth <= MATMUL_CHUNK or x.dim() < 2 or y.dim() < 2:
        return torch.matmul(x, y)
    parts = (
        torch.matmul(x[..., k : k + MATMUL_CHUNK], y[..., k : k + MATMUL_CHUNK, :]).half()
        for k in range(0, depth, MATMUL_CHUNK)
    )
    total = next(parts)
    for part in parts:
        total += part
    return total.float()


def half_cumsum(x: Tensor, axis: int) -> Tensor:
    """Return prefix sums, each rounded to float16."""
    total, prefixes = None, []
    for term in x.half().unbind(axis):
        total = term if total is None else total + term
        prefixes.append(total)
    return torch.stack(prefixes, axis).float()
