"""Causal Flow-Attention one token at a time: an exact recurrence with a state of fixed size.

Every prefix sum of the causal equations freezes at its own step, so a token
needs the sums alone (arXiv 2202.06258; see :func:`flow_attention_reference`):

    k_sum += k_t;  q_sum += q_t                         (D)
    x_t = n / ((q_t + ε) · (k_sum + ε));  y_t = n / ((k_t + ε) · (q_sum + ε))
    k_flow += k_t y_t;  q_flow += q_t x_t               (D)
    weight_sum += e_t;  context += k_tᵀ (e_t / weight_sum · n · v_t)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention.reference import feature_map
from flowexport.ops.flow_attention.variant import FlowVariant


class FlowState(NamedTuple):
    """What a causal Flow-Attention layer remembers; the names are those of exported states.

    Attributes:
        k_sum, q_sum: Σ k, Σ q, (B, H, D).
        k_flow, q_flow: Σ k y, Σ q x, (B, H, D).
        weight_sum: Σ exp(Ô − weight_max), (B, H, 1).
        weight_max: running maximum of Ô, (B, H, 1); stays 0 where the clamp
            makes it needless.
        context: Σ kᵀ (c v), (B, H, D, M).
        t: tokens seen, (1,).
    """

    k_sum: Tensor
    q_sum: Tensor
    k_flow: Tensor
    q_flow: Tensor
    weight_sum: Tensor
    weight_max: Tensor
    context: Tensor
    t: Tensor


def initial_state(
    variant: FlowVariant,
    batch: int,
    heads: int,
    width: int,
    value_width: int,
    dtype: torch.dtype = torch.float32,
) -> FlowState:
    """Return the state before the first token (the ``reset`` state).

    Args:
        variant: a causal one.
        batch, heads, width, value_width: B, H, D, M, all at least 1 (B may be 0).
        dtype: of the state; float32 or float64 for long streams.

    Raises:
        InputError: the variant is not causal.
    """
    _require_causal(variant)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, dtype=dtype)

    # A finite stand-in for −∞: files and runtimes carry it, and exp of it is 0.
    lowest = -1e4 if variant.needs_maximum else 0.0
    return FlowState(
        k_sum=zeros(width),
        q_sum=zeros(width),
        k_flow=zeros(width),
        q_flow=zeros(width),
        weight_sum=zeros(1),
        weight_max=zeros(1) + lowest,
        context=zeros(width, value_width),
        t=torch.zeros(1, dtype=dtype),
    )


def step(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, variant: FlowVariant
) -> tuple[Tensor, FlowState]:
    """Compute one token of causal Flow-Attention; L steps equal one forward.

    Args:
        q: logits (B, H, D). k: (B, H, D). v: (B, H, M).
        state: of :func:`initial_state` or the previous step; not changed.
        variant: the one the state was made for.

    Returns:
        The token's result, (B, H, M), and the next state.

    Raises:
        InputError: the state does not fit the token.

    Numerics: the sums grow with t; in float32 the error stays at rounding
    level for thousands of steps, in half they stagnate after about 2,000.
    """
    _require_causal(variant)
    _check(q, k, v, state)
    eps, outer = variant.eps, variant.outer_eps
    q, k = feature_map(q, variant), feature_map(k, variant)
    q_eps, k_eps = q + eps, k + eps

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * (b + eps)).sum(dim=-1, keepdim=True) + outer

    t = state.t + 1
    k_sum, q_sum = state.k_sum + k, state.q_sum + q
    x, y = t / dot(q_eps, k_sum), t / dot(k_eps, q_sum)
    k_flow, q_flow = state.k_flow + k * y, state.q_flow + q * x
    allocation = (dot(q_eps, k_flow) / t).sigmoid()
    flow = dot(k_eps, q_flow) / t
    if variant.clamp is not None:
        flow = flow.clamp(*variant.clamp)
    weight_max, weight_sum = state.weight_max, state.weight_sum
    if variant.needs_maximum:
        # Earlier contributions are normalised by their own Σ e, so only Σ e is rescaled.
        weight_max = torch.maximum(weight_max, flow)
        weight_sum = weight_sum * (state.weight_max - weight_max).exp()
        weight = (flow - weight_max).exp()
    else:
        weight = flow.exp()
    weight_sum = weight_sum + weight
    valued = v * (weight / weight_sum * t)
    context = state.context + k.unsqueeze(-1) * valued.unsqueeze(-2)
    result = (q.unsqueeze(-2) @ context).squeeze(-2) * (x / t * allocation)
    return result, FlowState(k_sum, q_sum, k_flow, q_flow, weight_sum, weight_max, context, t)


def _require_causal(variant: FlowVariant) -> None:
    if not variant.causal:
        raise InputError("flow attention: step has a non-causal variant; expected a causal one.")


def _check(q: Tensor, k: Tensor, v: Tensor, state: FlowState) -> None:
    if q.dim() != 3 or q.shape != k.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise InputError(
            f"flow attention: step has q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)},"
            f" {tuple(v.shape)}; expected (B, H, D), (B, H, D), (B, H, M)."
        )
    batch, heads, width = q.shape
    wanted = {
        **dict.fromkeys(("k_sum", "q_sum", "k_flow", "q_flow"), (batch, heads, width)),
        **dict.fromkeys(("weight_sum", "weight_max"), (batch, heads, 1)),
        "context": (batch, heads, width, v.shape[2]),
        "t": (1,),
    }
    for name, tensor in state._asdict().items():
        if tuple(tensor.shape) != tuple(wanted[name]):
            raise InputError(
                f"flow attention: state {name} has shape {tuple(tensor.shape)};"
                f" expected {tuple(wanted[name])}.",
                fix="start from initial_state of the same model",
            )
        if tensor.dtype != q.dtype:
            raise InputError(
                f"flow attention: state {name} has dtype {tensor.dtype}; expected {q.dtype}."
            )
