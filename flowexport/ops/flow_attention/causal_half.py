"""Causal Flow-Attention by running means: the causal form for half precision.

The published prefix sums grow with t, and their reciprocals leave half's range
(see :mod:`flowexport.ops.flow_attention.half`). With n_t = t + 1 and the
running mean M_t(x) = Σ_{s≤t} x_s / n_t the factors n_t cancel:

    i_t = (q_t + ε) · (M_t(k) + ε/n_t) + ε₂/n_t       = I_t / n_t = 1 / x_t
    o_t = (k_t + ε) · (M_t(q) + ε/n_t) + ε₂/n_t       = O_t / n_t = 1 / y_t
    Î_t = (q_t + ε) · (M_t(k / o) + ε/n_t) + ε₂/n_t
    Ô_t = clamp( (k_t + ε) · (M_t(q / i) + ε/n_t) + ε₂/n_t )
    R_t = (q_t / i_t) · M_t(kᵀ (e / M(e)) v) · a_t

which is exact algebra: no ε is dropped. A running mean is taken in chunks of c
tokens. With j tokens of a chunk seen, its share is β = j/n_t:

    M_t(x) = β · (mean of the chunk so far) + (1 − β) · (mean of all earlier chunks)

and the mean of the earlier chunks is a running mean again, of the chunks'
means. So no sum has more than 64 terms of similar size, whatever the length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowexport.ops.flow_attention.causal import CHUNK, prepare_causal
from flowexport.ops.flow_attention.half import fixed
from flowexport.ops.flow_attention.noncausal import scaled
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.flow_attention.reference import check_inputs
from flowexport.ops.flow_attention.variant import FlowVariant

# ln of half's smallest normal and largest number lie at -9.7 and 11.09, 20.8 apart:
# a clamp this wide fits between them when its middle is moved to WEIGHTS_MIDDLE.
WIDEST_HALF_CLAMP = 20.0
WEIGHTS_MIDDLE = 0.5
LARGEST_HALF = 65504.0


def causal_means(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute the causal variant by running means, in chunks of 64 tokens.

    Exact in exact arithmetic, ε included. In half arithmetic ε and ε/n_t are
    subnormals: where they are flushed, the result is the one for ε = 0, and
    rows whose features are all below 6e-8 become 0/0. A clamp whose bounds are
    more than 20 apart (no published one is) needs float32: e_t of the earliest
    tokens would vanish. Beyond 65,504 tokens a token that has nearly all of a sink's flow
    counts as 65,504 of them.

    Memory B·H·L·(64 + D·M/64), linear in L. A dynamic length takes one chunk:
    memory B·H·L², sums of L terms in one stage, with the bound that
    :func:`flowexport.ops.flow_attention.half.token_mean` tells.

    Args:
        q: logits (B, L, H, D). k: (B, L, H, D). v: (B, L, H, M).
        *arguments: the operator's arguments after v.

    Returns:
        (B, L, H, M).
    """
    check_inputs(q, k, v, asked := variant_of(arguments))
    batch, length, heads = q.shape[:3]
    chunks = _Chunks(length, q)
    if chunks.rest:
        # Features of padding must not be 0, which would give 0/0. XNNPACK pads with 0 alone.
        value = 0.0 if asked.feature_map == "sigmoid" else 1.0
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, chunks.rest), value=value) for x in (q, k, v))
    q, k, v, variant = prepare_causal(q, k, v, arguments, "causal_means")
    q, k, v = (chunks.split(x.flatten(0, 1)) for x in (q, k, v))  # (BH, G, c, D)
    eps, outer = (
        (torch.full_like(chunks.n, x) / chunks.n).to(q.dtype)
        for x in (variant.eps, variant.outer_eps)
    )

    def dot(a: Tensor, mean: Tensor) -> Tensor:
        """(a + ε) · (mean + ε/n) + ε₂/n."""
        result = ((a + variant.eps) * (mean + eps)).sum(dim=3, keepdim=True)
        return result + outer if variant.outer_eps else result

    normalized = q / dot(q, chunks.mean(k))
    allocation = dot(q, chunks.mean(k / dot(k, chunks.mean(q)))).sigmoid()
    weight = _weights(dot(k, chunks.mean(normalized)), variant, chunks)
    small = _competition_scale(variant, length)
    valued = scaled(v, 1 / small) * (weight / chunks.mean(weight))
    # A later token's product may be infinite in half, and 0 times that is no number. Those of
    # the tokens up to t are at most n_t. (A selection would leave XNNPACK, a minimum does not.)
    products = (normalized @ k.transpose(2, 3)).clamp(max=LARGEST_HALF)
    result = (products * chunks.mean_of_first) @ valued
    if chunks.count > 1:
        root = chunks.size**-0.5  # half of the mean's 1/c on each factor keeps both near 1
        context = (k * root).transpose(2, 3) @ (valued * root)  # (BH, G, D, M)
        context = earlier_mean(context.flatten(2)).unflatten(2, context.shape[2:])
        result = result * chunks.recent + (normalized @ context) * chunks.before
    result = chunks.join(scaled(result * allocation, small))
    return result.unflatten(0, (batch, heads)).transpose(1, 2)


class _Chunks:
    """``length`` tokens in chunks of 64, and the shares of a running mean over them.

    Attributes:
        size, count, rest: c tokens a chunk, G chunks, padding of the last.
        n: tokens up to each, (G, c, 1), exact.
        mean_of_first: row t averages the chunk's tokens up to t, (c, c).
        recent, before: β and 1 − β, (G, c, 1).
    """

    def __init__(self, length: Any, like: Tensor) -> None:
        static = fixed(length)
        self.length = length
        self.size = max(1, min(length, CHUNK)) if static else length
        self.count = -(-length // self.size) if static else 1
        self.rest = self.count * self.size - length if static else 0
        places, within = self.count * self.size, _numbers(1, self.size, like)
        self.n = _numbers(1, places, like).reshape(self.count, self.size, 1)
        triangle = _triangle(self.size, like)
        self.mean_of_first = (triangle / within).to(like.dtype)
        self.recent = (within / self.n).to(like.dtype)
        self.before = ((self.n - within) / self.n).to(like.dtype)

    def split(self, x: Tensor) -> Tensor:
        """Return (N, G c, C) as (N, G, c, C)."""
        return x.unflatten(1, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """Return (N, G, c, C) as (N, L, C), without the padding."""
        x = x.flatten(1, 2)
        return x[:, : self.length] if self.rest else x

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the tokens up to each, (N, G, c, C) -> (N, G, c, C)."""
        mean = self.mean_of_first @ x
        if self.count == 1:
            return mean
        return mean * self.recent + earlier_mean(mean[:, :, -1]).unsqueeze(2) * self.before


def running_mean(x: Tensor) -> Tensor:
    """Return the mean over the tokens up to each, (B, L, C) -> (B, L, C), by products.

    ``cumsum`` would leave the fused kernels of mobile runtimes, and half's range.
    """
    chunks = _Chunks(x.shape[1], x)
    return chunks.join(chunks.mean(chunks.split(F.pad(x, (0, 0, 0, chunks.rest)))))


def earlier_mean(x: Tensor) -> Tensor:
    """Return the mean over the earlier chunks, (N, G, C) -> (N, G, C); 0 for the first.

    One product with a triangle to 64 chunks, in levels of 64 beyond.
    """
    count = x.shape[1]
    size = min(count, CHUNK)
    earlier = _numbers(0, size, x)
    share = (_triangle(size, x, -1) / earlier.clamp(min=1)).to(x.dtype)
    if count <= CHUNK:
        return share @ x
    blocks = -(-count // CHUNK)
    blocked = F.pad(x, (0, 0, 0, blocks * CHUNK - count)).unflatten(1, (blocks, CHUNK))
    n = _numbers(0, blocks * CHUNK, x).clamp(min=1).reshape(blocks, CHUNK, 1)
    inside = (share @ blocked) * (earlier / n).to(x.dtype)
    outside = earlier_mean(blocked.mean(dim=2)).unsqueeze(2) * ((n - earlier) / n).to(x.dtype)
    return (inside + outside).flatten(1, 2)[:, :count]


def _numbers(first: int, count: Any, like: Tensor) -> Tensor:
    """Return first, first + 1, ..., (count, 1), in a dtype that counts tokens exactly.

    Half stops at 2,048; lowering folds them away.
    """
    end = first + count
    return torch.arange(first, end, dtype=_wide(like), device=like.device).unsqueeze(1)


def _triangle(size: Any, like: Tensor, diagonal: int = 0) -> Tensor:
    return torch.ones(size, size, dtype=_wide(like), device=like.device).tril(diagonal)


def _wide(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype is torch.float64 else torch.float32


def _weights(flow: Tensor, variant: FlowVariant, chunks: _Chunks) -> Tensor:
    """Return e_t up to a factor: exp of the clamped flow, among half's normal numbers."""
    assert variant.clamp is not None, "a causal variant has one"
    low, high = variant.clamp
    flow = flow.clamp(low, high)
    if high - low > WIDEST_HALF_CLAMP:
        if chunks.rest:  # padding must not raise the maximum
            flow = torch.where(chunks.n <= chunks.length, flow, flow[:, :1, :1])
        return (flow - flow.amax(dim=(1, 2), keepdim=True)).exp()
    middle = (low + high) / 2
    if high - low > WIDEST_HALF_CLAMP / 2:
        middle -= WEIGHTS_MIDDLE
    return (flow - middle if middle else flow).exp()


def _competition_scale(variant: FlowVariant, length: Any) -> float:
    """Return the power of two s for which c / s is held: the root of c's largest value.

    c_t is at most n_t, and at most exp of the clamp's width.
    """
    assert variant.clamp is not None
    largest = math.exp(min(variant.clamp[1] - variant.clamp[0], math.log(65536)))
    if isinstance(length, int):
        largest = min(largest, length)
    return 1.0 if largest <= CHUNK else float(2 ** round(math.log2(largest) / 2))
