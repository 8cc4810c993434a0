"""How an operator counts: the interpreter's modes, and sums and products in each.

Tensors of the storage types float16 and float32 both travel as torch.float32;
a float16 result is rounded to what float16 can hold unless the mode is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

FP16_LARGEST_SUBNORMAL = 2.0**-14 - 2.0**-24
MATMUL_CHUNK = 32
"""Products that ``acc16`` adds in float32 before each float16 addition: a dot unit's width."""


class Mode(StrEnum):
    """What happens to values that the program declares float16 (float32 ones are left alone).

    ``exact``: nothing. ``fp16``: every operator's result is rounded. ``ftz``: in
    addition, subnormals become zero, in constants too. ``acc16``: as ``fp16``, and
    sums run one by one with a float16 accumulator, matrix products in chunks.
    The last two are pessimistic: a device lies between them and ``fp16``.
    """

    EXACT = "exact"
    FP16 = "fp16"
    FTZ = "ftz"
    ACC16 = "acc16"


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of one operator: the mode, and whether its result is declared float16."""

    mode: Mode
    half: bool

    @property
    def narrow(self) -> bool:
        """Whether sums accumulate in float16."""
        return self.half and self.mode is Mode.ACC16

    def stored(self, x: Tensor) -> Tensor:
        """Return a float32 tensor as its declared storage holds it; shape kept."""
        if not self.half or self.mode is Mode.EXACT:
            return x
        rounded = x.half().float()
        if self.mode is Mode.FTZ:
            return torch.nn.functional.hardshrink(rounded, FP16_LARGEST_SUBNORMAL)
        return rounded

    def sum(self, x: Tensor, axes: Sequence[int], keep: bool = False) -> Tensor:
        """Sum over ``axes``; in ``acc16`` one by one in memory order."""
        if not axes:
            return x
        if not self.narrow or not x.is_floating_point():
            return x.sum(dim=list(axes), keepdim=keep, dtype=x.dtype)
        summed = sorted(a % x.dim() for a in axes)
        kept = [d for d in range(x.dim()) if d not in summed]
        shape = [x.shape[d] for d in kept]
        terms = x.permute(*summed, *kept).reshape(-1, *shape).half()
        total = torch.zeros(shape, dtype=torch.float16)
        for term in terms:
            total += term
        result = total.float()
        return (
            result.reshape([1 if d in summed else s for d, s in enumerate(x.shape)])
            if (keep)
            else result
        )

    def mean(self, x: Tensor, axes: Sequence[int], keep: bool = False) -> Tensor:
        """Average over ``axes``: the sum, then one division."""
        if not self.narrow:
            return x.mean(dim=list(axes), keepdim=keep) if axes else x
        count = 1
        for axis in axes:
            count *= x.shape[axis]
        return self.sum(x, axes, keep) / count

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply (..., n, k) by (..., k, m); in ``acc16`` chunks of k are added in float16."""
        depth = x.shape[-1]
        if not self.narrow or depth <= MATMUL_CHUNK or x.dim() < 2 or y.dim() < 2:
            return torch.matmul(x, y)
        parts = (
            torch.matmul(x[..., k : k + MATMUL_CHUNK], y[..., k : k + MATMUL_CHUNK, :]).half()
            for k in range(0, depth, MATMUL_CHUNK)
        )
        total = next(parts)
        for part in parts:
            total += part
        return total.float()

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        """Return prefix sums; in ``acc16`` with a float16 accumulator."""
        if not self.narrow or not x.is_floating_point():
            return x.cumsum(axis, dtype=x.dtype)
        total, prefixes = None, []
        for term in x.half().unbind(axis):
            total = term if total is None else total + term
            prefixes.append(total)
        return torch.stack(prefixes, axis).float()
