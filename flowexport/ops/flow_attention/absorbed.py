"""Flow-Attention with the values' and the output's projections inside its products.

With x the values' source, V = x Wᵥᵀ + bᵥ and e the competition's weights,

    Σₛ kₛ eₛ Vₛᵀ  =  (Σₛ kₛ eₛ xₛᵀ) Wᵥᵀ + (Σₛ kₛ eₛ) bᵥᵀ,

so V is never made: its projection is a product with the small (D, C) context. The
output's projection Wₒ likewise, context · Wₒᵀ a head; then one product of all heads at once,
(aq)ᵀ (C, C_out), gives the result. Both large products are as dense as the projections
they replace, with no product of width D in a tile of 16 left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention.noncausal import flows, prepare
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.flow_attention.reference import flow_attention_reference


@torch.library.custom_op("flowexport::flow_attention_absorbed", mutates_args=())
def _absorbed(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    feature_map: str,
    clamp: list[float] | None,
    eps: float,
    outer_eps: float,
    causal: bool,
    flow_axis: str,
    competition_axis: str,
) -> Tensor:
    arguments = (feature_map, clamp, eps, outer_eps, causal, flow_axis, competition_axis)
    v = linear(x, value_weight, value_bias).unflatten(-1, (q.shape[2], -1))
    y = flow_attention_reference(q, k, v, variant_of(arguments))
    return linear(y.flatten(2), out_weight, out_bias)


@_absorbed.register_fake
def _absorbed_fake(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    *arguments: Any,
    **keywords: Any,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], out_weight.shape[0]))


OVERLOAD = _absorbed._opoverload


def channel_first_absorbed(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """Compute as :func:`channel_first_sums`, V and the output's projection absorbed.

    Exact: only the order of sums differs from the reference between its projections.

    Args:
        q: logits (B, L, H, D). k: (B, S, H, D).
        x: what the values are projected from, (B, S, C).
        value_weight: (H·M, C). value_bias: (H·M,) or None.
        out_weight: (C_out, H·M). out_bias: (C_out,) or None.
        *arguments: the operator's arguments after v.

    Returns:
        (B, L, C_out).

    Raises:
        InputError: the tensors do not fit, or the variant is causal.
    """
    heads = q.shape[2]
    if value_weight.shape[0] % heads or out_weight.shape[1] != value_weight.shape[0]:
        raise InputError(
            f"flow attention: the weights are {tuple(value_weight.shape)} and"
            f" {tuple(out_weight.shape)}; expected (H·M, C) and (C_out, H·M) of {heads} heads."
        )
    width = value_weight.shape[0] // heads
    sources = x.unsqueeze(2).expand(-1, -1, heads, -1)
    variant = prepare(q, k, sources, arguments, "channel_first_absorbed")
    q, k = (a.permute(0, 2, 3, 1) for a in (q, k))
    q, k, allocation, weight, mean = flows(q, k, variant, products=False)
    weighted = (k * weight).flatten(1, 2)  # (B, H·D, S)
    split = (heads, k.shape[2])
    context = (weighted @ x).unflatten(1, split)  # (B, H, D, C)
    context = context @ value_weight.unflatten(0, (heads, width)).transpose(1, 2)
    if value_bias is not None:
        total = weighted.sum(dim=-1, keepdim=True).unflatten(1, split)
        context = context + total * value_bias.unflatten(0, (heads, 1, width))
    if mean is not None:
        context = context / mean
    result = context @ out_weight.transpose(0, 1).unflatten(0, (heads, width))
    y = (q * allocation).flatten(1, 2).transpose(1, 2) @ result.flatten(1, 2)
    return y if out_bias is None else y + out_bias


def alone(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a form of this signature as one of the attention alone: both layers the identity."""

    def compute(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        size = v.shape[2:]
        one = torch.eye(size.numel(), dtype=v.dtype, device=v.device)
        return form(q, k, v.flatten(2), one, None, one, None, *arguments).unflatten(2, size)

    return compute
