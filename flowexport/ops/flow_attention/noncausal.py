"""Non-causal Flow-Attention as matrix products: the operator's signature, no rank above 4.

Each form equals the reference up to rounding, ε included. With b' = b + ε,

    (a + ε) · b' + ε₂  =  a · b' + (ε Σ b' + ε₂),

so a flow is one matrix-vector product and a scalar a head, where the published
code multiplies two (B, N, H, D) tensors and reduces. Sizes are read from the
tensors; a dynamic L or S stays dynamic. No form divides a Python number by a
tensor: coremltools 9.0 turns ``1.0 / x`` into ``inverse`` with epsilon 1e-4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.flow_attention.reference import check_inputs, feature_map
from flowexport.ops.flow_attention.variant import FlowVariant


def prepare(q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...], form: str) -> FlowVariant:
    """Check the inputs and return the variant.

    Raises:
        InputError: the tensors do not fit, or the variant is causal.
    """
    variant = variant_of(arguments)
    check_inputs(q, k, v, variant)
    if variant.causal:
        raise InputError(
            f"flow attention: form {form} has a causal variant; expected a non-causal one.",
            fix="choose a causal form: causal_chunked, causal_triangular or causal_means",
        )
    return variant


def token_count(x: Tensor, axis: int) -> float | Tensor:
    """Return a tensor's size on ``axis``: a number if static, else a (1, 1, 1, 1) tensor.

    The tensor is summed from ones, so no symbolic float enters the graph
    (coremltools has no ``sym_float``).
    """
    size = x.shape[axis]
    if isinstance(size, int):
        return float(size)
    index = [slice(None) if i == axis else slice(0, 1) for i in range(4)]
    return torch.ones_like(x[tuple(index)]).sum(dim=axis, keepdim=True)


def sink_source_ratio(sinks: Tensor, sources: Tensor, axis: int) -> float | Tensor:
    """Return L / S: exactly 1.0 where the graph knows that they are equal."""
    if statically_known_true(sinks.shape[axis] == sources.shape[axis]):
        return 1.0
    return token_count(sinks, axis) / token_count(sources, axis)


def scaled(x: Tensor, factor: float | Tensor) -> Tensor:
    """Return x · factor, and x itself for the number 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x * factor


def weights(flow: Tensor, variant: FlowVariant, *axes: int) -> Tensor:
    """Return exp(clamp(Ô) − shift): the softmax's numerator along ``axes``.

    The shift is the maximum, or 0 where the clamp already keeps exp small.
    """
    if variant.clamp is not None:
        flow = flow.clamp(*variant.clamp)
    if variant.needs_maximum:
        flow = flow - flow.amax(dim=axes, keepdim=True)
    return flow.exp()


def channel_first(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute on (B, H, D, N): a flow is a row vector times a matrix.

    For ONNX Runtime's GEMM kernels. Exact: only the order of sums differs from
    the reference.

    Args:
        q: logits (B, L, H, D). k: (B, S, H, D). v: (B, S, H, M).
        *arguments: the operator's arguments after v.

    Returns:
        (B, L, H, M).
    """
    variant = prepare(q, k, v, arguments, "channel_first")
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    return _channel_first(q, k, v, variant, products=True)


def channel_first_sums(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute as :func:`channel_first`, but the flows by multiply and reduce.

    For XNNPACK, which packs the whole right side of a product, even for a
    single row. Exact, as :func:`channel_first`.
    """
    variant = prepare(q, k, v, arguments, "channel_first_sums")
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    return _channel_first(q, k, v, variant, products=False)


def _channel_first(
    q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant, *, products: bool
) -> Tensor:
    q, k, allocation, weight, mean = flows(q, k, variant, products=products)
    context = (v * weight) @ k.transpose(2, 3)
    if mean is not None:
        context = context / mean
    return ((context @ q) * allocation).permute(0, 3, 1, 2)


def flows(
    q: Tensor, k: Tensor, variant: FlowVariant, *, products: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the features and all that Flow-Attention needs beside the values.

    Args:
        q: logits (B, H, D, L). k: (B, H, D, S).
        products: sum by matrix products; by multiply and reduce where false.

    Returns:
        φ(q) and φ(k); the allocation divided by the incoming flow (B, H, 1, L);
        each source's weight (B, H, 1, S); and the weights' mean (B, H, 1, 1), by
        which the context is still to be divided, or None where it is not.
    """
    q, k = feature_map(q, variant), feature_map(k, variant)
    eps, outer = variant.eps, variant.outer_eps
    one = q.new_ones(1)

    if variant.flow_axis == "tokens" and products:

        def dot(a: Tensor, total: Tensor) -> Tensor:  # (B,H,D,N), (B,H,1,D) -> (B,H,1,N)
            total = total + eps
            return total @ a + (total.sum(dim=3, keepdim=True) * eps + outer)

        def total(x: Tensor, weight: Tensor | None = None) -> Tensor:
            if weight is not None:
                return weight @ x.transpose(2, 3)
            return x.sum(dim=3).unsqueeze(2)
    elif variant.flow_axis == "tokens":

        def dot(a: Tensor, total: Tensor) -> Tensor:  # (B,H,D,N), (B,H,D,1) -> (B,H,1,N)
            total = total + eps
            rest = total.sum(dim=2, keepdim=True) * eps + outer
            return (a * total).sum(dim=2, keepdim=True) + rest

        def total(x: Tensor, weight: Tensor | None = None) -> Tensor:
            return (x if weight is None else x * weight).sum(dim=3, keepdim=True)
    else:

        def dot(a: Tensor, total: Tensor) -> Tensor:  # (B,H,D,N), (B,1,D,N) -> (B,H,1,N)
            return ((a + eps) * (total + eps)).sum(dim=2, keepdim=True) + outer

        def total(x: Tensor, weight: Tensor | None = None) -> Tensor:
            return (x if weight is None else x * weight).sum(dim=1, keepdim=True)

    per_incoming = one / dot(q, total(k))
    per_outgoing = one / dot(k, total(q))
    sink = dot(q, total(k, per_outgoing))
    source = dot(k, total(q, per_incoming))
    allocation = scaled(sink, sink_source_ratio(q, k, 3)).sigmoid() * per_incoming
    if variant.competition_axis == "tokens":
        weight = weights(source, variant, 3)
        return q, k, allocation, weight, weight.mean(dim=3, keepdim=True)
    weight = weights(source, variant, 1)
    competition = weight / weight.sum(dim=1, keepdim=True)
    return q, k, allocation, scaled(competition, token_count(k, 3)), None


def token_major(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute on (B, H, N, D): a flow is a matrix times a column vector.

    Exact, as :func:`channel_first`, whose arguments and result it shares.
    """
    variant = prepare(q, k, v, arguments, "token_major")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = feature_map(q, variant), feature_map(k, variant)
    eps, outer = variant.eps, variant.outer_eps
    one = q.new_ones(1)

    if variant.flow_axis == "tokens":

        def dot(a: Tensor, total: Tensor) -> Tensor:  # (B,H,N,D), (B,H,D,1) -> (B,H,N,1)
            total = total + eps
            return a @ total + (total.sum(dim=2, keepdim=True) * eps + outer)

        def total(x: Tensor) -> Tensor:
            return x.sum(dim=2).unsqueeze(3)
    else:

        def dot(a: Tensor, total: Tensor) -> Tensor:  # (B,H,N,D), (B,1,N,D) -> (B,H,N,1)
            return ((a + eps) * (total + eps)).sum(dim=3, keepdim=True) + outer

        def total(x: Tensor) -> Tensor:
            return x.sum(dim=1, keepdim=True)

    per_incoming = one / dot(q, total(k))
    per_outgoing = one / dot(k, total(q))
    sink = dot(q, total(k * per_outgoing))
    source = dot(k, total(q * per_incoming))
    allocation = scaled(sink, sink_source_ratio(q, k, 2)).sigmoid() * per_incoming
    if variant.competition_axis == "tokens":
        weight = weights(source, variant, 2)
        context = (k.transpose(2, 3) @ (v * weight)) / weight.mean(dim=2, keepdim=True)
    else:
        weight = weights(source, variant, 1)
        competition = weight / weight.sum(dim=1, keepdim=True)
        context = k.transpose(2, 3) @ (v * scaled(competition, token_count(k, 2)))
    return ((q @ context) * allocation).transpose(1, 2)
