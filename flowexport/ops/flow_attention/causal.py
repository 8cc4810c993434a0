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


def prepare_causal(
    q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...], form: str
) -> tuple[Tensor, Tensor, Tensor, FlowVariant]:
    """Return φ(q), φ(k), v as (B, H, L, D) and the variant."""
    variant = variant_of(arguments)
    check_inputs(q, k, v, variant)
    if not variant.causal:
        raise InputError(
            f"flow attention: form {form} has a non-causal variant; expected a causal one.",
            fix="choose a non-causal form: channel_first, token_major or means",
        )
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

    Args and Returns: as :func:`causal_triangular`.
    """
    q, k, v, variant = prepare_causal(q, k, v, arguments, "causal_chunked")
    batch, heads, length = q.shape[:3]
    if not isinstance(length, int):
        raise InputError(
            f"flow attention: form causal_chunked has the dynamic length {length};"
            " expected a static one.",
            fix="choose causal_triangular or export static lengths",
        )
    eps, outer = variant.eps, variant.outer_eps
    count = -(-length // CHUNK)
    rest = count * CHUNK - length
    if rest:  # features of 1: zeros would give 0/0
        q, k = (F.pad(x, (0, 0, 0, rest), value=1.0) for x in (q, k))
        v = F.pad(v, (0, 0, 0, rest))
    n = torch.arange(1, count * CHUNK + 1, dtype=q.dtype, device=q.device)
    n = n.reshape(count, CHUNK, 1)
    triangle = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).tril()
    q, k, v = (x.flatten(0, 1).unflatten(1, (count, CHUNK)) for x in (q, k, v))  # (BH, G, c, D)
    qt, kt = q.transpose(2, 3), k.transpose(2, 3)
    q_eps, k_eps = q + eps, k + eps
    q_rest = q_eps.sum(dim=3, keepdim=True) * eps + outer
    k_rest = k_eps.sum(dim=3, keepdim=True) * eps + outer
    products = (q @ kt) * triangle  # (BH, G, c, c)
    sinks = products + (k.sum(dim=3).unsqueeze(2) * eps) * triangle  # (q + ε) · k
    sources = (k_eps @ qt) * triangle

    def before(x: Tensor) -> Tensor:  # (BH, G, D, c), (BH, G, c, 1) -> (BH, G, D, 1)
        return exclusive_prefix(x)

    ones = torch.ones(CHUNK, 1, dtype=q.dtype, device=q.device)
    x = n / (sinks @ ones + q_eps @ before(kt @ ones) + q_rest)
    y = n / (sources @ ones + k_eps @ before(qt @ ones) + k_rest)
    sink = (sinks @ y + q_eps @ before(kt @ y) + q_rest) / n
    source = (sources @ x + k_eps @ before(qt @ x) + k_rest) / n
    if rest and variant.needs_maximum:
        # Padding must not raise the maximum: it would push all real weights to 0.
        real = torch.arange(count * CHUNK, device=q.device).reshape(count, CHUNK, 1) < length
        source = torch.where(real, source, source[:, :1, :1])
    weight = weights(source, variant, 1, 2)
    competition = weight * n / (triangle @ weight + before(weight.sum(dim=2, keepdim=True)))
    valued = v * competition
    result = products @ valued + q @ before(kt @ valued)
    result = result * (x / n * sink.sigmoid())
    result = result.flatten(1, 2)[:, :length].unflatten(0, (batch, heads))
    return result.transpose(1, 2)
