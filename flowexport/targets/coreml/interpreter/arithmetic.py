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

from flowexport.ops.accumulate import half_cumsum, half_matmul, half_sum

FP16_LARGEST_SUBNORMAL = 2.0**-14 - 2.0**-24


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
        return half_sum(x, axes, keep)

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
        return half_matmul(x, y) if self.narrow else torch.matmul(x, y)

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        """Return prefix sums; in ``acc16`` with a float16 accumulator."""
        if not self.narrow or not x.is_floating_point():
            return x.cumsum(axis, dtype=x.dtype)
        return half_cumsum(x, axis)
