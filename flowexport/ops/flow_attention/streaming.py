"""Causal Flow-Attention one token at a time: an exact recurrence with a state of fixed size.

Every prefix sum of the causal equations freezes at its own step, so a token
needs the sums alone (arXiv 2202.06258; see :func:`flow_attention_reference`).
The state holds them as running means, m += (x − m) / n, so that no entry grows
with the stream; the factors n cancel as in
:mod:`flowexport.ops.flow_attention.causal_half`:

    k_mean, q_mean: means of k, q                       (D)
    i_t = (q_t + ε) · (k_mean + ε/n) + ε₂/n;  o_t = (k_t + ε) · (q_mean + ε/n) + ε₂/n
    k_flow, q_flow: means of k / o, q / i               (D)
    weight_mean: mean of e;  context: mean of kᵀ (e_t / weight_mean · v_t)
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
        k_mean, q_mean: means of k, q, (B, H, D).
        k_flow, q_flow: means of k / o, q / i, (B, H, D).
        weight_mean: mean of exp(Ô − weight_max), (B, H, 1).
        weight_max: running maximum of Ô, (B, H, 1); stays 0 where the clamp
            makes it needless.
        context: mean of kᵀ (c v), (B, H, D, M).
        t: tokens seen, (1,).
    """

    k_mean: Tensor
    q_mean: Tensor
    k_flow: Tensor
    q_flow: Tensor
    weight_mean: Tensor
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
        dtype: of the state and of the arithmetic; float32 or float64.

    Raises:
        InputError: the variant is not causal.
    """
    _require_causal(variant)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, dtype=dtype)

    # A finite stand-in for −∞: files and runtimes carry it, and exp of it is 0.
    lowest = -1e4 if variant.needs_maximum else 0.0
    return FlowState(
        k_mean=zeros(width),
        q_mean=zeros(width),
        k_flow=zeros(width),
        q_flow=zeros(width),
        weight_mean=zeros(1),
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
        The token's result, (B, H, M), of q's dtype, and the next state, of the state's.

    Raises:
        InputError: the state does not fit the token.

    Numerics: computed in the state's dtype. In float32 the error stays at
    rounding level for thousands of steps. A mean in half stops moving after
    about 2,000 tokens, so a half model carries a float32 state.
    """
    _require_causal(variant)
    _check(q, k, v, state)
    dtype, wide = q.dtype, state.t.dtype
    q, k, v = (as_dtype(x, wide) for x in (q, k, v))
    q, k = feature_map(q, variant), feature_map(k, variant)
    t = state.t + 1
    # Not 1.0 / t, which coremltools 9.0 turns into 1 / (t + 1e-4).
    share = torch.ones_like(t) / t

    def dot(a: Tensor, mean: Tensor) -> Tensor:
        """(a + ε) · (mean + ε/n) + ε₂/n."""
        product = (a + variant.eps) * (mean + variant.eps * share)
        result = product.sum(dim=-1, keepdim=True)
        return result + variant.outer_eps * share if variant.outer_eps else result

    def moved(mean: Tensor, x: Tensor) -> Tensor:
        return mean + (x - mean) * share

    k_mean, q_mean = moved(state.k_mean, k), moved(state.q_mean, q)
    normalized = q / dot(q, k_mean)
    k_flow = moved(state.k_flow, k / dot(k, q_mean))
    q_flow = moved(state.q_flow, normalized)
    allocation = dot(q, k_flow).sigmoid()
    flow = dot(k, q_flow)
    if variant.clamp is not None:
        flow = flow.clamp(*variant.clamp)
    weight_max, weight_mean = state.weight_max, state.weight_mean
    if variant.needs_maximum:
        # Earlier contributions are normalised by their own mean of e, so only that is rescaled.
        weight_max = torch.maximum(weight_max, flow)
        weight_mean = weight_mean * (state.weight_max - weight_max).exp()
        weight = (flow - weight_max).exp()
    else:
        weight = flow.exp()
    weight_mean = moved(weight_mean, weight)
    valued = v * (weight / weight_mean)
    context = moved(state.context, k.unsqueeze(-1) * valued.unsqueeze(-2))
    result = (normalized.unsqueeze(-2) @ context).squeeze(-2) * allocation
    following = FlowState(k_mean, q_mean, k_flow, q_flow, weight_mean, weight_max, context, t)
    return as_dtype(result, dtype), following


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype; x itself, without a node in an exported graph, where it has it."""
    return x if x.dtype is dtype else x.to(dtype)


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
        **dict.fromkeys(("k_mean", "q_mean", "k_flow", "q_flow"), (batch, heads, width)),
        **dict.fromkeys(("weight_mean", "weight_max"), (batch, heads, 1)),
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
        if tensor.dtype != state.t.dtype or torch.promote_types(q.dtype, tensor.dtype) != (
            tensor.dtype
        ):
            raise InputError(
                f"flow attention: state {name} has dtype {tensor.dtype}; expected one for the"
                f" whole state, {q.dtype} or wider."
            )
