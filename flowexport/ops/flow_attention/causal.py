"""Causal Flow-Attention without cumulative sums over (B, H, L, D, M): chunks and triangles.

With T the lower triangle of ones, every prefix sum of products is a masked
matrix product:

    (q_t + ε) · (Σ_{s≤t} k_s + ε)  =  Σ_s T_ts (q_t + ε) · k_s  +  ε Σ (q_t + ε)

so the flows, the competition and the result are matrix products, L x L for a
short sequence and chunk by chunk, with what earlier chunks sum to, for a long
one. Both forms equal the reference up to rounding, ε included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention.noncausal import weights
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.flow_attention.reference import check_inputs, feature_map
from flowexport.ops.flow_attention.variant import FlowVariant

CHUNK = 64
# Elements of a tensor that a group of heads may have: half a megabyte in float32.
GROUP = 1 << 17


def _causal_variant(
    q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...], form: str
) -> FlowVariant:
    variant = variant_of(arguments)
    check_inputs(q, k, v, variant)
    if not variant.causal:
        raise InputError(
            f"flow attention: form {form} has a non-causal variant; expected a causal one.",
            fix="choose a non-causal form: channel_first, token_major or means",
        )
    return variant


def prepare_causal(
    q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...], form: str
) -> tuple[Tensor, Tensor, Tensor, FlowVariant]:
    """Return φ(q), φ(k), v as (B, H, L, D) and the variant."""
    variant = _causal_variant(q, k, v, arguments, form)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return feature_map(q, variant), feature_map(k, variant), v, variant


def causal_triangular(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute the causal variant by L x L lower-triangular matrices: for short L.

    Memory B·H·L². The length may be dynamic.

    Args:
        q: logits (B, L, H, D). k: (B, L, H, D). v: (B, L, H, M).
        *arguments: the operator's arguments after v.

    Returns:
        (B, L, H, M).
    """
    q, k, v, variant = prepare_causal(q, k, v, arguments, "causal_triangular")
    eps, outer = variant.eps, variant.outer_eps
    length = q.shape[2]
    n = torch.arange(1, length + 1, dtype=q.dtype, device=q.device).unsqueeze(1)
    triangle = torch.ones(length, length, dtype=q.dtype, device=q.device).tril()
    q_eps, k_eps = q + eps, k + eps
    q_rest = q_eps.sum(dim=3, keepdim=True) * eps + outer
    k_rest = k_eps.sum(dim=3, keepdim=True) * eps + outer
    sinks = (q_eps @ k.transpose(2, 3)) * triangle  # (B, H, L, L)
    sources = (k_eps @ q.transpose(2, 3)) * triangle
    x = n / (sinks.sum(dim=3, keepdim=True) + q_rest)
    y = n / (sources.sum(dim=3, keepdim=True) + k_rest)
    sink = (sinks @ y + q_rest) / n
    weight = weights((sources @ x + k_rest) / n, variant, 2)
    competition = weight * n / (triangle @ weight)
    context = (q @ k.transpose(2, 3) * triangle) @ (v * competition)
    return (context * (x / n * sink.sigmoid())).transpose(1, 2)


def exclusive_prefix(x: Tensor) -> Tensor:
    """Return the sum over the earlier chunks, (BH, G, R, C) -> (BH, G, R, C).

    A strictly lower-triangular product over G; beyond 64 chunks in two levels,
    so the triangles grow as G^½ blocks of 64, not as G².
    """
    count = x.shape[1]
    flat = x.flatten(2)  # (BH, G, RC)
    if count <= CHUNK:
        return _triangle(count, x).matmul(flat).unflatten(2, x.shape[2:])
    blocks = -(-count // CHUNK)
    if rest := blocks * CHUNK - count:
        flat = F.pad(flat, (0, 0, 0, rest))
    blocked = flat.unflatten(1, (blocks, CHUNK))  # (BH, G/64, 64, RC)
    before = exclusive_prefix(blocked.sum(dim=2, keepdim=True))  # (BH, G/64, 1, RC)
    total = _triangle(CHUNK, x).matmul(blocked) + before
    return total.flatten(1, 2)[:, :count].unflatten(2, x.shape[2:])


def _triangle(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril(-1)


def causal_chunked(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute the causal variant in chunks of 64 tokens: for long L.

    Memory B·H·L·(64 + D·M/64), linear in L. The length must be static.

    One product of q and k serves both flows: masked below the diagonal for the
    sinks, above it for the sources. ε enters by row sums. q stays token-major
    and k channel-first, so that no product has a transposed factor, which
    costs ONNX Runtime up to twenty times the product's own time.

    Args and Returns: as :func:`causal_triangular`.
    """
    variant = _causal_variant(q, k, v, arguments, "causal_chunked")
    return _chunked(q, k, v, variant, _static_length(q, "causal_chunked"))


def causal_chunked_heads(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute as :func:`causal_chunked`, a few heads at a time: for very long L.

    No head knows another, so the result is the same. What is alive at once
    shrinks to a group's share, at most 2^17 elements a tensor unless one head
    alone has more: at L = 4,096 with 8 heads of 64 ONNX Runtime needs 69 MB
    extra in place of 113. Slicing costs time and the nodes grow with the groups.

    Args and Returns: as :func:`causal_triangular`.
    """
    variant = _causal_variant(q, k, v, arguments, "causal_chunked_heads")
    length, heads = _static_length(q, "causal_chunked_heads"), q.shape[2]
    groups = _groups(heads, length * heads * max(q.shape[3], v.shape[3]))
    if groups == 1:
        return _chunked(q, k, v, variant, length)
    parts = []
    for i in range(groups):
        # Every groups-th head: ONNX Runtime makes neighbours' slices one Split, all alive at once.
        q_own, k_own, v_own = (x[:, :, i::groups] for x in (q, k, v))
        parts.append(_chunked(q_own, k_own, v_own, variant, length))
    return torch.stack(parts, dim=3).flatten(2, 3)


def _groups(heads: int, elements: int) -> int:
    """Return the least divisor of ``heads`` whose share of ``elements`` is at most 2^17, or all."""
    return next((n for n in range(1, heads) if heads % n == 0 and elements <= n * GROUP), heads)


def _static_length(q: Tensor, form: str) -> int:
    length = q.shape[1]
    if not isinstance(length, int):
        raise InputError(
            f"flow attention: form {form} has the dynamic length {length}; expected a static one.",
            fix="choose causal_triangular or export static lengths",
        )
    return length


def _chunked(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant, length: int) -> Tensor:
    batch, heads, width = q.shape[0], q.shape[2], q.shape[3]
    eps, outer = variant.eps, variant.outer_eps
    count = -(-length // CHUNK)
    rest = count * CHUNK - length
    if rest:  # logits of 0: their features are positive, features of 0 would give 0/0
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, rest)) for x in (q, k, v))
    q, k, v = (x.reshape(batch * count, CHUNK, heads, x.shape[3]) for x in (q, k, v))
    q = feature_map(q, variant).permute(0, 2, 1, 3)  # (BG, H, c, D)
    kt = feature_map(k, variant).permute(0, 2, 3, 1)  # (BG, H, D, c)
    v = v.permute(0, 2, 1, 3)
    n = torch.arange(1, count * CHUNK + 1, dtype=q.dtype, device=q.device)
    n = n.reshape(count, 1, CHUNK)
    lower = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).tril()
    upper = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).triu()
    product = q @ kt  # (BG, H, c, c)
    past, future = product * lower, product * upper
    q_sum, k_sum = q.sum(dim=3), kt.sum(dim=2)  # (BG, H, c)
    q_rest = (q_sum + width * eps) * eps + outer
    k_rest = (k_sum + width * eps) * eps + outer

    def by_chunk(x: Tensor) -> Tensor:  # (BG, ...) -> (B, G, ...)
        return x.unflatten(0, (batch, count))

    def before(x: Tensor) -> Tensor:  # (BG, H, R, C): the sum over earlier chunks
        flat = by_chunk(x.flatten(1, 2))
        return exclusive_prefix(flat).flatten(0, 1).unflatten(1, (heads, x.shape[2]))

    def sinks(weight: Tensor | None = None) -> Tensor:
        """Σ_{s≤t} (q_t + ε) · k_s w_s + ε Σ (q_t + ε) + ε₂, (B, G, H, c)."""
        if weight is None:
            inside, sums, moment = past.sum(dim=3), k_sum, kt.sum(dim=3, keepdim=True)
        else:
            column = weight.flatten(0, 1).unsqueeze(3)
            inside, moment = (past @ column).squeeze(3), kt @ column
            sums = k_sum * weight.flatten(0, 1)
        earlier = before(moment)  # (BG, H, D, 1)
        outside = (q @ earlier).squeeze(3) + earlier.sum(dim=2) * eps
        return by_chunk(inside + (sums @ upper) * eps + outside + q_rest)

    def sources(weight: Tensor | None = None) -> Tensor:
        """Σ_{s≤t} (k_t + ε) · q_s w_s + ε Σ (k_t + ε) + ε₂, (B, G, H, c)."""
        if weight is None:
            inside, sums, moment = future.sum(dim=2), q_sum, q.sum(dim=2, keepdim=True)
        else:
            row = weight.flatten(0, 1).unsqueeze(2)
            inside, moment = (row @ future).squeeze(2), row @ q
            sums = q_sum * weight.flatten(0, 1)
        earlier = before(moment)  # (BG, H, 1, D)
        outside = (earlier @ kt).squeeze(2) + earlier.sum(dim=3) * eps
        return by_chunk(inside + (sums @ upper) * eps + outside + k_rest)

    x, y = n / sinks(), n / sources()
    sink, source = sinks(y) / n, sources(x) / n
    if rest and variant.needs_maximum:
        # Padding must not raise the maximum: it would push all real weights to 0.
        real = torch.arange(count * CHUNK, device=q.device).reshape(count, 1, CHUNK) < length
        source = torch.where(real, source, source[:, :1, :, :1])
    weight = weights(source, variant, 1, 3)
    total = weight @ upper + exclusive_prefix(weight.sum(dim=3, keepdim=True))
    valued = v * (weight * n / total).flatten(0, 1).unsqueeze(3)
    result = past @ valued + q @ before(kt @ valued)
    result = result * (x / n * sink.sigmoid()).flatten(0, 1).unsqueeze(3)
    result = result.permute(0, 2, 1, 3).reshape(batch, count * CHUNK, heads, v.shape[3])
    return result[:, :length] if rest else result
