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


def carried(x: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a start plus the sum over the earlier chunks, and over all of them.

    Args:
        x: (BG, ...), G = ``count`` chunks of each sequence. start: (B, N), N values a chunk.

    Returns:
        (BG, ...) and (B, N).
    """
    flat, all_rows, batch = x.flatten(1), x.new_ones(1, count), start.shape[0]
    if _single(batch):  # ONNX's Gemm adds the start
        sums = torch.addmm(start, _triangle(count, x), flat)
        return sums.reshape(x.shape), torch.addmm(start, all_rows, flat)
    flat = flat.unflatten(0, (batch, count))
    sums = exclusive_prefix(flat) + start.unsqueeze(1)
    return sums.reshape(x.shape), (all_rows @ flat).squeeze(1) + start


def _single(batch: int) -> bool:
    return isinstance(batch, int) and batch == 1


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
    result = result.transpose(1, 2).reshape(batch, tokens[0].shape[1], heads, width)
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
    flows = (q.new_full((batch, rows), variant.eps) for _ in range(4))
    highest = (q.new_full((batch, heads), LOWEST),) if variant.needs_maximum else ()
    context = q.new_zeros(batch, rows * value_width)
    carry = (*flows, q.new_zeros(batch, heads), *highest, context)
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
        carry: what the tokens before sum to: k, q, k y, q x, each plus ε (B, HD), the
            weights and, where the variant needs it, their largest exponent (B, H), the
            context (B, HDM). None: no tokens before, none to come.
        q: logits (B, L, H, D). k: (B, L, H, D). v: (B, L, H, M). L a multiple of 64.
        n: 1, 2, ... of the tokens, (1, L, 1, 1). real: which are no padding, None for all.

    Returns:
        (BG, H, 64, M) and the carry behind these tokens, empty for None.
    """
    batch, length, heads = q.shape[:3]
    eps, outer, count = variant.eps, variant.outer_eps, length // CHUNK
    q, k, v = (x.reshape(batch * count, CHUNK, heads, x.shape[3]) for x in (q, k, v))
    # The features first: a transpose of what has just been written is cheaper.
    q = feature_map(q, variant).permute(0, 2, 1, 3)  # (BG, H, c, D)
    kt = feature_map(k, variant).permute(0, 2, 3, 1)  # (BG, H, D, c)
    v = v.permute(0, 2, 1, 3)
    n = n.reshape(count, 1, 1, CHUNK)
    if not _single(batch):
        n = n.repeat(batch, 1, 1, 1)
    n_column = n.reshape(n.shape[0], 1, CHUNK, 1)
    lower = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).tril()
    upper = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device).triu()
    upper_eps = upper * eps
    product = q @ kt  # (BG, H, c, c)
    past, future = product * lower, product * upper
    q_sum, k_sum = q.sum(dim=3), kt.sum(dim=2)  # (BG, H, c)
    behind: list[Tensor] = []

    def before(x: Tensor, start: Tensor | float) -> Tensor:
        """Return start plus the sum over the earlier chunks, (BG, ...) -> (BG, ...)."""
        if isinstance(start, Tensor):
            sums, following = carried(x, start, count)
            behind.append(following)
            return sums
        sums = exclusive_prefix(x.flatten(1).unflatten(0, (batch, count)))
        return (sums + start if start else sums).reshape(x.shape)

    # Of rank 3: LiteRT's converter fails on (1, H, 1, c) by (c, c).
    def rest(sums: Tensor, earlier: Tensor) -> Tensor:
        """Return ε Σ_{s≤t} Σ_d b_s + ε₂, (BG, H, c); sums: Σ_d b, earlier: (BG, H, D)."""
        row = sums @ upper_eps + earlier.sum(dim=2, keepdim=True) * eps
        return row + outer if outer else row

    # Σ_{s≤t} (a_t + ε) · b_s + ε Σ (a_t + ε) + ε₂: sinks are columns, sources rows.
    def sink_flow(inside: Tensor, sums: Tensor, moment: Tensor, start: Tensor | float) -> Tensor:
        earlier = before(moment, start)  # (BG, H, D, 1); ε is in the start
        return inside + (q @ earlier + rest(sums, earlier.squeeze(3)).unsqueeze(3))

    def source_flow(inside: Tensor, sums: Tensor, moment: Tensor, start: Tensor | float) -> Tensor:
        earlier = before(moment, start)  # (BG, H, 1, D)
        return inside + (earlier @ kt + rest(sums, earlier.squeeze(2)).unsqueeze(2))

    def total(x: Tensor, dim: int) -> Tensor:
        return x.sum(dim=dim, keepdim=True)

    starts = (eps,) * 4 if carry is None else carry[:4]
    x = n_column / sink_flow(total(past, 3), k_sum, total(kt, 3), starts[0])
    y = n / source_flow(total(future, 2), q_sum, total(q, 2), starts[1])
    row, column = x.reshape(y.shape), y.reshape(x.shape)
    sink = sink_flow(past @ column, k_sum * y.squeeze(2), kt @ column, starts[2]) / n_column
    source = source_flow(row @ future, q_sum * x.squeeze(3), row @ q, starts[3]) / n
    weight, start, highest = _weights(source.squeeze(2), (batch, count), real, carry, variant)
    competition = weight * n.squeeze(2) / (weight @ upper + before(total(weight, 2), start))
    behind += highest
    valued = v * competition.unsqueeze(3)
    context = before(kt @ valued, 0.0 if carry is None else carry[-1])
    result = (past @ valued + q @ context) * (x / n_column * sink.sigmoid())
    return result, tuple(behind)


def _weights(
    source: Tensor,
    groups: tuple[int, int],
    real: Tensor | None,
    carry: tuple[Tensor, ...] | None,
    variant: FlowVariant,
) -> tuple[Tensor, Tensor | float, list[Tensor]]:
    """Return the weights (BG, H, c), those before them (B, H), the largest exponent so far.

    Without a clamp that keeps exp small the shift is the largest so far: an earlier total
    follows it by a factor; what the context holds is divided by its own total already.
    """
    if not variant.needs_maximum:
        return weights(source, variant), 0.0 if carry is None else carry[4], []
    chunks = source.unflatten(0, groups)  # (B, G, H, c)
    if real is not None:
        # Padding must not raise the maximum: it would push all real weights to 0.
        real = real.reshape(-1, 1, CHUNK)
        chunks = torch.where(real, chunks, chunks[:, :1, :, :1])
    if carry is None:
        return weights(chunks, variant, 1, 3).reshape(source.shape), 0.0, []
    before, highest = carry[4:6]
    if variant.clamp is not None:
        chunks = chunks.clamp(*variant.clamp)
    shift = torch.maximum(highest, chunks.amax(dim=(1, 3)))
    weight = (chunks - shift.unsqueeze(1).unsqueeze(3)).exp().reshape(source.shape)
    return weight, before * (highest - shift).exp(), [shift]
