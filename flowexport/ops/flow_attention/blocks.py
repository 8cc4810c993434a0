"""Non-causal Flow-Attention on (B, N, H·D), no head split: block-diagonal matrix products.

With E the (C, H) matrix that sums each head's channels, all heads' flows are
one product with the block-diagonal matrix diag(Σk) E, and the context is the
C x C product kᵀ v masked to its H diagonal blocks. That is H times the context's
arithmetic in exchange for no transposes and few large products: it pays where
C is small against N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowexport.ops.flow_attention.noncausal import (
    prepare,
    scaled,
    sink_source_ratio,
    token_count,
    weights,
)
from flowexport.ops.flow_attention.reference import feature_map


def block_diagonal(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute all heads together by block-diagonal products, for XNNPACK.

    Exact: only the order of sums differs from the reference.

    Args and Returns: as :func:`channel_first`.
    """
    variant = prepare(q, k, v, arguments, "block_diagonal")
    heads, width, value_width = q.shape[2], q.shape[3], v.shape[3]
    eye = torch.eye(heads, dtype=q.dtype, device=q.device)
    gather = eye.repeat_interleave(width, dim=0)  # E (C, H)
    spread = eye.repeat_interleave(value_width, dim=1)  # (H, HM)
    blocks = gather @ spread  # (C, HM)
    ratio, count = (
        x if isinstance(x, float) else x.flatten(2)  # (1, 1, 1)
        for x in (sink_source_ratio(q, k, 1), token_count(k, 1))
    )
    q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
    q, k = feature_map(q, variant), feature_map(k, variant)
    qt, kt = q.transpose(1, 2), k.transpose(1, 2)
    eps, outer = variant.eps, variant.outer_eps
    one = q.new_ones(1)

    if variant.flow_axis == "tokens":

        def dot(a: Tensor, total: Tensor) -> Tensor:  # (B,N,C), (B,C,1 or H) -> (B,N,H)
            block = (total + eps) * gather
            return a @ block + (block.sum(dim=1, keepdim=True) * eps + outer)

        per_incoming = one / dot(q, k.sum(dim=1).unsqueeze(2))
        per_outgoing = one / dot(k, q.sum(dim=1).unsqueeze(2))
        sink = dot(q, kt @ per_outgoing)
        source = dot(k, qt @ per_incoming)
    else:
        same = torch.eye(width, dtype=q.dtype, device=q.device).repeat(heads, heads)

        def flow(a: Tensor, b: Tensor) -> Tensor:  # Σ over heads by a product
            return ((a + eps) * (b @ same + eps)) @ gather + outer

        per_incoming = one / flow(q, k)
        per_outgoing = one / flow(k, q)
        sink = flow(q, k * (per_outgoing @ gather.t()))
        source = flow(k, q * (per_incoming @ gather.t()))
    allocation = scaled(sink, ratio).sigmoid() * per_incoming
    if variant.competition_axis == "tokens":
        weight = weights(source, variant, 1)
        competition = weight / weight.mean(dim=1, keepdim=True)
    else:
        weight = weights(source, variant, 2)
        competition = scaled(weight / weight.sum(dim=2, keepdim=True), count)
    context = (kt @ (v * (competition @ spread))) * blocks
    return ((q @ context) * (allocation @ spread)).unflatten(2, (heads, value_width))
