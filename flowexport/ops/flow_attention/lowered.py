"""Export-friendly forms of Flow-Attention: the operator's own signature, B,N,H,D.

Each form is equal to the reference up to rounding, or says which ε it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from flowexport.ops.descriptor import Absorbing, AttentionDescriptor, AttentionSite
from flowexport.ops.flow_attention import absorbed
from flowexport.ops.flow_attention.causal import (
    causal_chunked,
    causal_scan,
    causal_triangular,
)
from flowexport.ops.flow_attention.causal_half import causal_means
from flowexport.ops.flow_attention.half import means
from flowexport.ops.flow_attention.noncausal import channel_first, channel_first_sums, token_major
from flowexport.ops.flow_attention.op import _flow_attention, variant_of
from flowexport.ops.flow_attention.reference import flow_attention_reference
from flowexport.ops.flow_attention.table import choose
from flowexport.ops.flow_attention.variant import FlowVariant


def published(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Compute the published equations as they stand (the baseline of every benchmark)."""
    return flow_attention_reference(q, k, v, variant_of(arguments))


FORMS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "published": published,
        "channel_first": channel_first,
        # The same mathematics; lowering computes q, k, v as W xᵀ + b where it can.
        "channel_first_projected": channel_first,
        "channel_first_sums": channel_first_sums,
        # The same where lowering cannot absorb v's and the output's projections.
        "channel_first_absorbed": channel_first_sums,
        "token_major": token_major,
        "means": means,
        "causal_chunked": causal_chunked,
        "causal_scan": causal_scan,
        "causal_triangular": causal_triangular,
        "causal_means": causal_means,
    }
)


ABSORBING: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"channel_first_absorbed": absorbed.channel_first_absorbed}
)


def attention_of(form: str) -> Callable[..., Tensor]:
    """Return a form as a function of q, k, v, for tests and measures of its errors."""
    return absorbed.alone(ABSORBING[form]) if form in ABSORBING else FORMS[form]


def applicable(variant: FlowVariant) -> tuple[str, ...]:
    """Return the forms that compute this variant."""
    return tuple(
        name
        for name in FORMS
        if name == "published" or name.startswith("causal_") == variant.causal
    )


# Their chunks are counted when the graph is made.
STATIC_LENGTH = ("causal_chunked", "causal_scan")


def misfit(form: str, site: AttentionSite) -> str | None:
    """Return what of an attention a form does not compute, or None where it computes it."""
    variant = variant_of(site.arguments)
    if form not in applicable(variant):
        return "is causal" if variant.causal else "is not causal"
    if form in STATIC_LENGTH and not isinstance(site.k_shape[1], int):
        return "has a dynamic length"
    return None


def attributes(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the ONNX attributes of a FlowAttention node (no attribute means the default)."""
    variant = variant_of(arguments)
    result: dict[str, Any] = {
        "feature_map": variant.feature_map,
        "eps": variant.eps,
        "outer_eps": variant.outer_eps,
        "causal": int(variant.causal),
        "flow_axis": variant.flow_axis,
        "competition_axis": variant.competition_axis,
    }
    if variant.clamp is not None:
        result["clamp"] = list(variant.clamp)
    return result


DESCRIPTOR = AttentionDescriptor(
    name="FlowAttention",
    overload=_flow_attention._opoverload,
    forms=FORMS,
    choose=choose,
    attributes=attributes,
    misfit=misfit,
    absorbing=Absorbing(absorbed.OVERLOAD, ABSORBING),
)
