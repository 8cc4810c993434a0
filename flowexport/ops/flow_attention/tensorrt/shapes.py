"""What the kernel is checked and timed on: shapes, and float64 truths that fit in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowexport.ops.flow_attention.variant import FlowVariant

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int, int, int, int]
"""(B, L, S, H, D, M)"""

CHECKED: tuple[Shape, ...] = (
    (2, 1, 1, 2, 8, 8),
    (2, 49, 49, 12, 64, 64),
    (2, 196, 196, 12, 32, 32),
    (1, 784, 784, 12, 16, 16),
    (1, 3136, 3136, 12, 8, 8),
    (1, 777, 531, 3, 33, 70),
    (1, 1000, 1000, 2, 128, 128),
    (1, 4096, 4096, 2, 64, 64),
)
"""Correctness: vision stages, ragged sizes, odd widths; S becomes L where a variant needs that."""

LONG: tuple[Shape, ...] = ((1, 65536, 65536, 2, 8, 8), (1, 65536, 65536, 2, 64, 64))

TIMED: tuple[Shape, ...] = (
    *((b, n, n, 12, d, d) for b in (1, 64) for n, d in ((3136, 8), (784, 16), (196, 32), (49, 64))),
    *((8, n, n, 8, 64, 64) for n in (196, 1024, 4096, 16384, 65536)),
    *((1, n, n, 8, 64, 64) for n in (4096, 16384, 65536)),
)
"""Vision stages at batch 1 and 64, then long sequences at (8, 8, N, 64) and (1, 8, N, 64)."""


def causal_truth(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant, chunk: int = 512) -> Tensor:
    """Compute the causal form in float64 without the (B, L, H, D, M) tensor of the reference.

    Args:
        q: sinks' logits before the feature map, (B, L, H, D).
        k: sources' logits, (B, L, H, D).
        v: sources' values, (B, L, H, M).
        variant: a causal variant with a clamp of at most ±100 (exp needs no shift then).
        chunk: tokens of one masked product.

    Returns:
        (B, L, H, M), float64, on the inputs' device.
    """
    import torch

    from flowexport.ops.flow_attention.reference import feature_map

    assert variant.clamp is not None
    q, k, v = feature_map(q.double(), variant), feature_map(k.double(), variant), v.double()
    eps = variant.eps
    n = torch.arange(1, q.shape[1] + 1, dtype=q.dtype, device=q.device)[None, :, None, None]

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return ((a + eps) * (b + eps)).sum(-1, keepdim=True) + variant.outer_eps

    x, y = n / dot(q, k.cumsum(1)), n / dot(k, q.cumsum(1))
    sink = dot(q, (k * y).cumsum(1)) / n
    weight = (dot(k, (q * x).cumsum(1)) / n).clamp(*variant.clamp).exp()
    values = v * (weight / weight.cumsum(1) * n)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    parts = []
    for first in range(0, q.shape[1], chunk):
        rows = slice(first, first + chunk)
        scores = torch.einsum("blhd,bshd->bhls", q[:, rows], k[:, rows]).tril()
        part = torch.einsum("bhls,bshm->blhm", scores, values[:, rows])
        parts.append(part + torch.einsum("blhd,bhdm->blhm", q[:, rows], state))
        state = state + torch.einsum("bshd,bshm->bhdm", k[:, rows], values[:, rows])
    return torch.cat(parts, 1) * (x / n) * sink.sigmoid()
