"""Causal Flow-Attention without cumulative sums over (B, H, L, D, M): chunks and triangles.

With T the lower triangle of ones, every prefix sum of products is a masked
matrix product:

    (q_t + ε) · (Σ_{s≤t} k_s + ε)  =  Σ_s T_ts (q_t + ε) · k_s  +  ε Σ (q_t + ε)

so the flows, the competition and the result are matrix products, L x L for a
short sequence and chunk by chunk, with what earlier chunks sum to, for a long
one. Both forms equal the reference up to rounding, ε included.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention.noncausal import weights
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.flow_attention.reference import check_inputs, feature_map
from flowexport.ops.flow_attention.variant import FlowVariant
from flowexport.ops.segments import over_segments

CHUNK = 64
# Chunks of a segment: at eight heads of 64 its tensors have half a megabyte in float32.
SEGMENT = 4
# A finite stand-in for −∞, as in streaming: no exponent is below it, and exp of it is 0.
LOWEST = -1e4


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
    """Return the sum over the earlier chunks, (B, G, ...) -> (B, G, ...).

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
    length = _static_length(q, "causal_chunked")
    batch, heads, width = q.shape[0], q.shape[2], v.shape[3]
    tokens = padded(q, k, v, -(-length // CHUNK) * CHUNK)
    result, _ = _segment(variant, None, *tokens)
    result = result.reshape(batch, tokens[0].shape[1], heads, width)
    return result if result.shape[1] == length else result[:, :length]


def causal_scan(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute as :func:`causal_chunked`, 256 tokens after 256: for long L.

    What a segment needs of the earlier ones is a carry of fixed size, as in
    streaming, so only a segment's intermediates are alive at once and stay in
    the processor's caches. A target that has loops gets one
    (:func:`~flowexport.ops.segments.loops`), the others a copy a segment.

    Args and Returns: as :func:`causal_triangular`.
    """
    variant = _causal_variant(q, k, v, arguments, "causal_scan")
    length = _static_length(q, "causal_scan")
    batch, heads, value_width = q.shape[0], q.shape[2], v.shape[3]
    size = segment_size(length)
    if size >= length:
        return causal_chunked(q, k, v, *arguments)
    rows = heads * q.shape[3]
    flows = (q.new_full((batch, 1, rows), variant.eps) for _ in range(4))
    highest = (q.new_full((batch, 1, heads), LOWEST),) if variant.needs_maximum else ()
    context = q.new_zeros(batch, 1, rows * value_width)
    carry = (*flows, q.new_zeros(batch, 1, heads), *highest, context)
    tokens = padded(q, k, v, -(-length // size) * size)
    result = over_segments(functools.partial(_segment, variant), carry, tokens, size)
    return result if result.shape[1] == length else result[:, :length]


def _static_length(q: Tensor, form: str) -> int:
    length = q.shape[1]
    if not isinstance(length, int):
        raise InputError(
            f"flow attention: form {form} has the dynamic length {length}; expected a static one.",
            fix="choose causal_triangular or export static lengths",
        )
    return length


def segment_size(length: int) -> int:
    """Return how many tokens a segment has: whole chunks, at most 256, as equal as they can be."""
    count = -(-length // CHUNK)
    segments = max(-(-count // SEGMENT), 1)
    return -(-count // segments) * CHUNK


def padded(q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return q, k, v with logits of 0 up to ``size`` tokens, n = 1, 2, ..., and any padding's mask.

    Logits of 0 have positive features; features of 0 would give 0/0.
    """
    length = q.shape[1]
    n = torch.arange(1, size + 1, dtype=q.dtype, device=q.device).reshape(1, size, 1, 1)
    if size == length:
        return q, k, v, n
    return *(F.pad(x, (0, 0, 0, 0, 0, size - length)) for x in (q, k, v)), n, n <= length


def _segment(
    variant: FlowVariant,
    carry: tuple[Tensor, ...] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    real: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute whole chunks of tokens.

    Args:
        carry: what the tokens before sum to: k, q, k y, q x, each plus ε (B, 1, HD), the
            weights and, where the variant needs it, their largest exponent (B, 1, H), the
            context (B, 1, HDM). None: no tokens before, none to come.
        q: logits (B, L, H, D). k: (B, L, H, D). v: (B, L, H, M). L a multiple of 64.
        n: 1, 2, ... of the tokens, (1, L, 1, 1). real: which are no padding, None for all.

    Returns:
        (BG, 64, H, M) and the carry behind these tokens, empty for None.
    """
    batch, length, heads = q.shape[:3]
    eps, outer, count = variant.eps, variant.outer_eps, length // CHUNK
    q, k, v = (x.reshape(batch * count, CHUNK, heads, x.shape[3]) for x in (q, k, v))
    q = feature_map(q.permute(0, 2, 1, 3), variant)  # (BG, H, c, D)
    kt = feature_map(k.permute(0, 2, 3, 1), variant)  # (BG, H, D, c)
    v = v.permute(0, 2, 1, 3)
    n = n.reshape(count, 1, CHUNK)
    real = None if real is None else real.reshape(count, 1, CHUNK)
    lower = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).tril()
    upper = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).triu()
    upper_eps = upper * eps
    product = q @ kt  # (BG, H, c, c)
    past, future = product * lower, product * upper
    q_sum, k_sum = q.sum(dim=3), kt.sum(dim=2)  # (BG, H, c)
    behind: list[Tensor] = []

    def by_chunk(x: Tensor) -> Tensor:  # (BG, ...) -> (B, G, ...)
        return x.unflatten(0, (batch, count))

    def before(x: Tensor, start: Tensor | float) -> Tensor:
        """Return start plus the sum over the earlier chunks, (BG, ...) -> (BG, ...)."""
        flat = by_chunk(x.flatten(1))
        sums = exclusive_prefix(flat)
        if isinstance(start, Tensor) or start:
            sums = sums + start
        if carry is not None:
            behind.append(flat.new_ones(1, count) @ flat + start)
        return sums.reshape(x.shape)

    def flow(inside: Tensor, outside: Tensor, sums: Tensor, total: Tensor) -> Tensor:
        """Σ_{s≤t} (a_t + ε) · b_s + ε Σ (a_t + ε) + ε₂, (B, G, H, c); sums, total: Σ_d b."""
        result = inside + sums @ upper_eps + (outside + total * eps)
        return by_chunk(result + outer if outer else result)

    def sink_flow(inside: Tensor, sums: Tensor, moment: Tensor, start: Tensor | float) -> Tensor:
        earlier = before(moment, start)  # (BG, H, D, 1); ε is in the start
        return flow(
            inside, (q @ earlier).squeeze(3), sums, earlier.squeeze(3).sum(dim=2, keepdim=True)
        )

    def source_flow(inside: Tensor, sums: Tensor, moment: Tensor, start: Tensor | float) -> Tensor:
        earlier = before(moment, start)  # (BG, H, 1, D)
        return flow(
            inside, (earlier @ kt).squeeze(2), sums, earlier.squeeze(2).sum(dim=2, keepdim=True)
        )

    starts = (eps,) * 4 if carry is None else carry[:4]
    x = n / sink_flow(past.sum(dim=3), k_sum, kt.sum(dim=3, keepdim=True), starts[0])
    y = n / source_flow(future.sum(dim=2), q_sum, q.sum(dim=2, keepdim=True), starts[1])
    own_x, own_y = x.flatten(0, 1), y.flatten(0, 1)  # (BG, H, c)
    column, row = own_y.unsqueeze(3), own_x.unsqueeze(2)
    sink = sink_flow((past @ column).squeeze(3), k_sum * own_y, kt @ column, starts[2]) / n
    source = source_flow((row @ future).squeeze(2), q_sum * own_x, row @ q, starts[3]) / n
    weight, total, highest = _weights(source, real, carry, variant)
    total = weight @ upper + by_chunk(before(weight.sum(dim=3).flatten(0, 1), total).unsqueeze(2))
    behind += highest
    valued = v * (weight * n / total).flatten(0, 1).unsqueeze(3)
    context = before(kt @ valued, 0.0 if carry is None else carry[-1])
    result = (past @ valued + q @ context) * (x / n * sink.sigmoid()).flatten(0, 1).unsqueeze(3)
    return result.permute(0, 2, 1, 3), tuple(behind)


def _weights(
    source: Tensor, real: Tensor | None, carry: tuple[Tensor, ...] | None, variant: FlowVariant
) -> tuple[Tensor, Tensor | float, list[Tensor]]:
    """Return the weights (B, G, H, c), those before them (B, 1, H), the largest exponent so far.

    Without a clamp that keeps exp small the shift is the largest so far: an earlier total
    follows it by a factor; what the context holds is divided by its own total already.
    """
    if variant.needs_maximum and real is not None:
        # Padding must not raise the maximum: it would push all real weights to 0.
        source = torch.where(real, source, source[:, :1, :, :1])
    if carry is None:
        return weights(source, variant, 1, 3), 0.0, []
    if not variant.needs_maximum:
        return weights(source, variant), carry[4], []
    total, highest = carry[4:6]
    if variant.clamp is not None:
        source = source.clamp(*variant.clamp)
    shift = torch.maximum(highest, source.amax(dim=(1, 3)).unsqueeze(1))
    weight = (source - shift.unsqueeze(3)).exp()
    return weight, total * (highest - shift).exp(), [shift]
