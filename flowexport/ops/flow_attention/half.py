"""Flow-Attention whose intermediate results stay near 1: the form for half precision.

The published sums grow with N: in IEEE half 1/I is subnormal above
N·D ≈ 65 k, zero above 262 k, and sums pass 65,504 on other paths. With means
(m_k = Σk / S and so on) the factors N cancel:

    i_i = (q_i + ε) · (m_k + ε/S) + ε₂/S            = I_i / S
    o_j = (k_j + ε) · (m_q + ε/L) + ε₂/L            = O_j / L
    Î_i L/S = (q_i + ε) · (mean_j(k_j / o_j) + ε L/S) + ε₂ L/S
    Ô_j = (k_j + ε) · (L/S mean_i(q_i / i_i) + ε) + ε₂
    R_i = (q_i / i_i) · mean_j(k_jᵀ c_j v_j) · a_i

which is exact algebra: no ε is dropped.

Features of ``relu`` have no upper end and may all be 0, so their products leave half at
both ends: above √(65,504 / D), and where a token has nothing but ε. So each token and
each mean is divided by its own largest feature, see :func:`_relu_flows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flowexport.ops.flow_attention.noncausal import (
    prepare,
    scaled,
    sink_source_ratio,
    weights,
)
from flowexport.ops.flow_attention.reference import feature_map
from flowexport.ops.flow_attention.variant import FlowVariant

# A sum of this many halves of similar size keeps ten bits even in a half accumulator.
LONGEST_SUM = 64
# Of half. What is smaller is a subnormal, which some devices take for 0.
SMALLEST_NORMAL = 2.0**-14


def chunks(size: int) -> list[tuple[int, int, int]]:
    """Split ``size`` tokens into (start, count, length) runs of equal chunks.

    One run where size = count · length with both near its root, else a run of
    chunks of 64 and a shorter rest, so that a prime needs no padding.
    """
    if size <= LONGEST_SUM:
        return [(0, 1, size)]
    root = size**0.5
    lengths = [n for n in range(16, 513) if size % n == 0 and root / 4 <= n <= root * 4]
    if lengths:
        length = min(lengths, key=lambda n: abs(n - root))
        return [(0, size // length, length)]
    length = max(LONGEST_SUM, int(root))
    count = size // length
    runs = [(0, count, length)]
    if size % length:
        runs.append((count * length, 1, size % length))
    return runs


_AS_DYNAMIC: ContextVar[bool] = ContextVar("flow_attention_as_dynamic", default=False)


@contextmanager
def as_dynamic() -> Iterator[None]:
    """Compute the forms inside as a graph of dynamic length does, to check that one."""
    token = _AS_DYNAMIC.set(True)
    try:
        yield
    finally:
        _AS_DYNAMIC.reset(token)


def fixed(size: Any) -> bool:
    """Whether a length is a number that the graph may be built on."""
    return isinstance(size, int) and not _AS_DYNAMIC.get()


def token_mean(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale · mean over the tokens, (B, H, N, D) -> (B, H, 1, D), in two stages.

    ``scale`` is applied between the stages. A dynamic N takes one stage (torch.export
    proves no split of it). In a float32 accumulator that is enough: its error is at most
    (N − 1) 2⁻²⁴ of the mean of the magnitudes (Higham, *Accuracy and Stability*, 4.2), below
    four of half's units of 2⁻¹⁰ for N up to 65,536, and √N 2⁻²⁴ at random. In a half
    accumulator it is not: a sum stops growing at 2,048. The range check tells it.
    """
    size = x.shape[2]
    if not fixed(size):
        return scaled(x.mean(dim=2, keepdim=True), scale)
    result = None
    for start, count, length in chunks(size):
        run = x if count * length == size else x[:, :, start : start + count * length]
        if count == 1:
            mean = scaled(run.mean(dim=2, keepdim=True), scale)
        else:
            parts = run.flatten(0, 1).unflatten(1, (count, length)).mean(dim=2)
            mean = scaled(parts, scale).mean(dim=1, keepdim=True).unflatten(0, x.shape[:2])
        mean = scaled(mean, count * length / size)
        result = mean if result is None else result + mean
    assert result is not None
    return result


def outer_mean(k: Tensor, v: Tensor) -> Tensor:
    """Return the mean over the tokens of kᵀ v, (B, H, N, D), (B, H, N, M) -> (B, H, D, M).

    Both factors carry half of each chunk's 1/n, so no product leaves half's range.
    """
    size = k.shape[2]
    if not fixed(size):
        tokens = _tokens(k)
        root = (torch.ones_like(tokens) / tokens).sqrt().to(k.dtype)
        return (k * root).transpose(2, 3) @ (v * root)
    result = None
    for start, count, length in chunks(size):
        a, b = (
            x if count * length == size else x[:, :, start : start + count * length] for x in (k, v)
        )
        root = length**-0.5
        if count > 1:
            a, b = (x.flatten(0, 1).unflatten(1, (count, length)) for x in (a, b))
        mean = scaled(a, root).transpose(2, 3) @ scaled(b, root)
        if count > 1:
            mean = mean.mean(dim=1).unflatten(0, k.shape[:2])
        mean = scaled(mean, count * length / size)
        result = mean if result is None else result + mean
    assert result is not None
    return result


def _tokens(x: Tensor) -> Tensor:
    """Return N of (B, H, N, D) as a (1, 1, 1, 1) tensor of at least float32.

    Half ends at 65,504. Summed from ones, as :func:`token_count` does it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.ones_like(x[:1, :1, :, :1], dtype=wide).sum(dim=2, keepdim=True)


def _share(x: Tensor) -> float | Tensor:
    """Return 1 / N of (B, H, N, D)."""
    if fixed(x.shape[2]):
        return 1 / x.shape[2]
    count = _tokens(x)
    return (torch.ones_like(count) / count).to(x.dtype)


def _ratio(sinks: Tensor, sources: Tensor) -> float | Tensor:
    """Return L / S."""
    ratio = sink_source_ratio(sinks, sources, 2)
    if isinstance(ratio, float):
        return ratio
    return (_tokens(sinks) / _tokens(sources)).to(sinks.dtype)


_Flows = tuple[Tensor, Tensor, Tensor, Tensor]
"""q / i (B, H, L, D), Î L/S (B, H, L, 1), Ô (B, H, S, 1) and k (B, H, S, D); k may be divided
by a factor of its mean's that q / i then has."""


def _token_flows(q: Tensor, k: Tensor, variant: FlowVariant) -> _Flows:
    q, k = feature_map(q, variant), feature_map(k, variant)
    eps, outer = variant.eps, variant.outer_eps
    ratio = _ratio(q, k)
    per_sink, per_source = _share(q), _share(k)

    def dot(a: Tensor, mean: Tensor, share: float | Tensor) -> Tensor:
        """(a + ε) · (mean + ε share) + ε₂ share."""
        mean = mean.transpose(2, 3) + eps * share
        return a @ mean + (mean.sum(dim=2, keepdim=True) * eps + outer * share)

    incoming = dot(q, token_mean(k), per_source)
    outgoing = dot(k, token_mean(q), per_sink)
    normalized = q / incoming
    sink = dot(q, token_mean(k / outgoing), ratio)
    return normalized, sink, dot(k, scaled(token_mean(normalized), ratio), 1.0), k


def _head_flows(q: Tensor, k: Tensor, variant: FlowVariant) -> _Flows:
    q, k = feature_map(q, variant), feature_map(k, variant)

    def flow(a: Tensor, b: Tensor) -> Tensor:
        product = (a + variant.eps) * (b.sum(dim=1, keepdim=True) + variant.eps)
        return product.sum(dim=3, keepdim=True) + variant.outer_eps

    normalized = q / flow(q, k)
    return normalized, flow(q, k / flow(k, q)), flow(k, normalized), k


def _relu_flows(q: Tensor, k: Tensor, variant: FlowVariant) -> _Flows:
    """Compute the flows of the features relu(x) + ε with every factor of a product near 1.

    With s_i the largest of relu(q_i), and S and T the largest of the means of relu(q) and of
    relu(k) (each at least 2⁻¹⁴), the factors cancel as the N of the means do:

        i'_i = ((q_i + ε) / s_i) · ((m_k + ε/S') / T) + ε₂ / (S' s_i T) = i_i / (s_i T)
        q_i / i_i = ((q_i / s_i) / i'_i) / T
        Î_i L/S' = s_i/S ((q_i + ε) / s_i) · (mean_j(S k_j / o_j) + S ε L/S') + ε₂ L/S'

    (S' sources), and o, k / o and Ô likewise. ε / s_i is (ε 2¹⁴) (2⁻¹⁴ / s_i): both are normal
    numbers where a token has nothing but ε, and where they are not, ε is below 2⁻¹⁴ of s_i.
    Exact in exact arithmetic, ε included.
    """
    floor = max(SMALLEST_NORMAL, variant.eps)
    eps, outer = variant.eps / floor, variant.outer_eps / floor**2
    ratio = _ratio(q, k)
    per_sink, per_source = _share(q), _share(k)
    least = q.new_full((1,), floor)

    def divided(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return relu(x) / s, floor / s and s of each row."""
        largest = torch.maximum(x.amax(dim=3, keepdim=True), least)
        return x / largest, least / largest, largest

    q, k = q.relu(), k.relu()
    q_mean, q_small, q_all = divided(token_mean(q))
    k_mean, k_small, k_all = divided(token_mean(k))
    q, q_unit, q_each = divided(q)
    k, k_unit, k_each = divided(k)

    def dot(a: Tensor, unit: Tensor, mean: Tensor) -> Tensor:
        """The feature is relu(x) + ε, and the flow's factor has another ε."""
        return (a + unit * (2 * eps)) @ mean.transpose(2, 3)

    incoming = dot(q, q_unit, k_mean + k_small * (eps * (1 + per_source)))
    outgoing = dot(k, k_unit, q_mean + q_small * (eps * (1 + per_sink)))
    if outer:
        incoming = incoming + q_unit * k_small * (outer * per_source)
        outgoing = outgoing + k_unit * q_small * (outer * per_sink)
    normalized = (q + q_unit * eps) / incoming
    sources = token_mean((k + k_unit * eps) / outgoing)
    sinks = scaled(token_mean(normalized), ratio)
    # S ε as (S floor) (ε / floor), for the same reason.
    sink = dot(q, q_unit, sources + scaled(q_all * floor * eps, ratio)) * (q_each / q_all)
    source = dot(k, k_unit, sinks + k_all * floor * eps) * (k_each / k_all)
    if outer:
        sink, source = sink + variant.outer_eps * ratio, source + variant.outer_eps
    return normalized, sink, source, (k + k_unit * eps) * (k_each / k_all)


def means(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute Flow-Attention by means instead of sums, every mean in two stages.

    Exact in exact arithmetic, ε included. In half arithmetic the ε of 1e-6 is
    a subnormal: where it is flushed, the result is the one for ε = 0, and rows
    whose features are all below 6e-8 become 0/0.

    Of ``relu`` features ε is kept even there: see :func:`_relu_flows`.

    Where the result itself grows with N (competition over heads, flows over
    heads) it is scaled last, in two steps of √S.

    Args and Returns: as :func:`channel_first`.
    """
    variant = prepare(q, k, v, arguments, "means")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    sources = k.shape[2]
    if variant.flow_axis == "heads":
        flows = _head_flows
    else:
        flows = _relu_flows if variant.feature_map == "relu" else _token_flows
    normalized, sink, source, k = flows(q, k, variant)
    allocation = sink.sigmoid()
    grown = variant.flow_axis == "heads" or variant.competition_axis == "heads"
    small = 1.0  # the competition is held at 1/small of its value, which may be up to S
    if variant.competition_axis == "heads":
        weight = weights(source, variant, 1)
        competition = weight / weight.sum(dim=1, keepdim=True)
    else:
        weight = weights(source, variant, 2)
        bounded = variant.clamp is not None and max(map(abs, variant.clamp)) <= 2
        if fixed(sources) and not bounded:
            small = max(1.0, sources**0.5 / 2)
        competition = weight / token_mean(weight, small)
    context = scaled(outer_mean(k, v * competition), small)
    if not grown:
        return ((normalized @ context) * allocation).transpose(1, 2)
    root = float(sources) ** 0.5 if fixed(sources) else _tokens(k).sqrt().to(k.dtype)
    return ((normalized @ (context * root)) * allocation * root).transpose(1, 2)
