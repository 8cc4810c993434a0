"""Flow-Attention as published: slow, plain, and the truth all other forms are tested against.

Equation names follow Wu et al., ICML 2022 (arXiv 2202.06258), section 3.
Layout is B,N,H,D throughout: q (B, L, H, D), k (B, S, H, D), v (B, S, H, M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention.variant import FlowVariant

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant) -> None:
    """Raise InputError unless q, k and v fit each other and the variant."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise InputError(
                f"flow attention: {name} has {tensor.dim()} dimensions; expected 4 (B, N, H, D)."
            )
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"flow attention: {name} has dtype {tensor.dtype}; expected one of {DTYPES}."
            )
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(
            f"flow attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype};"
            " expected one dtype."
        )
    if not q.shape[0] == k.shape[0] == v.shape[0] or not q.shape[2] == k.shape[2] == v.shape[2]:
        raise InputError(
            f"flow attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)},"
            f" {tuple(v.shape)}; expected the same batch and head counts."
        )
    if k.shape[1] != v.shape[1]:
        raise InputError(
            f"flow attention: k has {k.shape[1]} tokens and v {v.shape[1]}; expected as many."
        )
    if q.shape[3] != k.shape[3]:
        raise InputError(
            f"flow attention: q has width {q.shape[3]} and k {k.shape[3]}; expected as wide."
        )
    if (variant.causal or variant.flow_axis == "heads") and q.shape[1] != k.shape[1]:
        raise InputError(
            f"flow attention: q has {q.shape[1]} tokens and k {k.shape[1]};"
            " expected as many (the variant is causal or sums over heads)."
        )


def feature_map(x: Tensor, variant: FlowVariant) -> Tensor:
    """Return φ(x), non-negative, same shape and dtype."""
    if variant.feature_map == "sigmoid":
        return torch.sigmoid(x)
    return torch.relu(x) + variant.eps


def _clamp(flow: Tensor, variant: FlowVariant) -> Tensor:
    return flow if variant.clamp is None else flow.clamp(*variant.clamp)


def flow_attention_reference(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant) -> Tensor:
    """Compute Flow-Attention by the published equations.

    Args:
        q: sinks' logits before the feature map, (B, L, H, D).
        k: sources' logits before the feature map, (B, S, H, D).
        v: sources' values, (B, S, H, M).
        variant: which published variant.

    Returns:
        (B, L, H, M), of the inputs' dtype, computed in that dtype.

    Raises:
        InputError: the shapes or dtypes do not fit.

    Numerics: I and O grow as N·D/4; in half precision this form overflows or
    loses its result on long sequences. It is the truth in fp32 and fp64 only.
    """
    check_inputs(q, k, v, variant)
    q, k = feature_map(q, variant), feature_map(k, variant)
    if variant.causal:
        return _causal(q, k, v, variant)
    eps, outer = variant.eps, variant.outer_eps
    sinks, sources = q.shape[1], k.shape[1]
    axis = 1 if variant.flow_axis == "tokens" else 2

    def total(x: Tensor) -> Tensor:
        return x.sum(dim=axis, keepdim=True)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return ((a + eps) * (b + eps)).sum(dim=-1, keepdim=True) + outer

    incoming = dot(q, total(k))  # I  (B, L, H, 1)
    outgoing = dot(k, total(q))  # O  (B, S, H, 1)
    conserved_sink = dot(q, total(k / outgoing))  # Î
    conserved_source = _clamp(dot(k, total(q / incoming)), variant)  # Ô
    allocation = torch.sigmoid(conserved_sink * (sinks / sources))
    competition_axis = 1 if variant.competition_axis == "tokens" else 2
    competition = torch.softmax(conserved_source, dim=competition_axis) * sources
    context = torch.einsum("bshd,bshm->bhdm", k, v * competition)
    return torch.einsum("blhd,bhdm->blhm", q / incoming, context) * allocation


def _causal(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant) -> Tensor:
    """The causal equations on φ(q), φ(k): every sum is a prefix sum over tokens."""
    eps, outer = variant.eps, variant.outer_eps
    n = torch.arange(1, q.shape[1] + 1, dtype=q.dtype, device=q.device)[None, :, None, None]

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return ((a + eps) * (b + eps)).sum(dim=-1, keepdim=True) + outer

    x = n / dot(q, k.cumsum(dim=1))  # n_t / I_t  (B, L, H, 1)
    y = n / dot(k, q.cumsum(dim=1))  # n_t / O_t
    conserved_sink = dot(q, (k * y).cumsum(dim=1)) / n
    conserved_source = _clamp(dot(k, (q * x).cumsum(dim=1)) / n, variant)
    allocation = torch.sigmoid(conserved_sink)
    # A shift by the maximum over all tokens cancels in e_t / Σ e_s and keeps exp finite.
    shift = conserved_source.amax(dim=1, keepdim=True) if q.shape[1] else conserved_source
    weight = (conserved_source - shift).exp()
    competition = weight / weight.cumsum(dim=1) * n
    outer_product = k[..., :, None] * (v * competition)[..., None, :]  # (B, L, H, D, M)
    context = outer_product.cumsum(dim=1)
    return torch.einsum("blhd,blhdm->blhm", q * x / n, context) * allocation
