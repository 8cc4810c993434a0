"""The torch operator ``flowexport::flow_attention``: one node through ``torch.export``.

Its schema repeats :class:`FlowVariant`'s fields because an operator's
arguments must be plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowexport.ops.flow_attention.reference import check_inputs, flow_attention_reference
from flowexport.ops.flow_attention.variant import FlowVariant

OP_NAME = "flowexport::flow_attention"


def _variant(
    feature_map: str,
    clamp: Sequence[float] | None,
    eps: float,
    outer_eps: float,
    causal: bool,
    flow_axis: str,
    competition_axis: str,
) -> FlowVariant:
    bounds = None if clamp is None else (float(clamp[0]), float(clamp[1]))
    return FlowVariant(feature_map, bounds, eps, outer_eps, causal, flow_axis, competition_axis)


@torch.library.custom_op(OP_NAME, mutates_args=())
def _flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    clamp: Sequence[float] | None,
    eps: float,
    outer_eps: float,
    causal: bool,
    flow_axis: str,
    competition_axis: str,
) -> Tensor:
    variant = _variant(feature_map, clamp, eps, outer_eps, causal, flow_axis, competition_axis)
    return flow_attention_reference(q, k, v, variant).contiguous()


@_flow_attention.register_fake
def _flow_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **keywords: Any
) -> Tensor:
    check_inputs(q, k, v, _variant(*arguments, **keywords))
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    variant = _variant(*ctx.arguments)
    # The reference is differentiated, not a formula of ours: the gradient is the forward's own.
    _, pullback, *_ = torch.func.vjp(
        lambda q, k, v: flow_attention_reference(q, k, v, variant), *ctx.saved_tensors
    )
    return (*pullback(grad), *(None for _ in ctx.arguments))


_flow_attention.register_autograd(_backward, setup_context=_setup_context)


def op_arguments(variant: FlowVariant) -> tuple[Any, ...]:
    """Return the operator's arguments after q, k, v, in schema order."""
    return (
        variant.feature_map,
        None if variant.clamp is None else list(variant.clamp),
        variant.eps,
        variant.outer_eps,
        variant.causal,
        variant.flow_axis,
        variant.competition_axis,
    )


def variant_of(arguments: Sequence[Any]) -> FlowVariant:
    """Return the variant that a node's arguments after q, k, v describe."""
    return _variant(*arguments)


def flow_attention(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant) -> Tensor:
    """Compute Flow-Attention (arXiv 2202.06258) as one operator that export keeps whole.

    Args:
        q: sinks' logits before the feature map, (B, L, H, D).
        k: sources' logits before the feature map, (B, S, H, D).
        v: sources' values, (B, S, H, M).
        variant: which published variant.

    Returns:
        (B, L, H, M), contiguous, of the inputs' dtype. Differentiable once.

    Raises:
        InputError: the shapes or dtypes do not fit.
    """
    result: Tensor = _flow_attention(q, k, v, *op_arguments(variant))
    return result
