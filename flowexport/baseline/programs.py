"""The two programs that ours is measured beside: the published form, and only the GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowexport.core.errors import LoweringError
from flowexport.core.types import TensorSpec
from flowexport.ops.installed import installed_ops
from flowexport.resolve import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowexport.lowering import LoweredProgram


def projections_only(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Return v plus one value a head of q's and k's first tokens: attention at no cost.

    The result keeps the operator's shape (B, L, H, M). q and k enter through
    a slice of (B, 1, H, 1) each, so that no exporter can drop their
    projections, which no runtime computes in part; one broadcast addition
    to v is all that is left of the attention. Where L differs from S the first
    value stands for all: v[:, :1] + k's slice, broadcast to L by q[..., :1].
    """
    first = k[:, :1, :, :1]
    if q.shape[1] == v.shape[1]:
        return v + (q[:, :1, :, :1] + first)
    return q[..., :1] + (v[:, :1] + first)


def features_and_products(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Return φ(q) (φ(k)ᵀ v): what every form of Flow-Attention computes, and nothing else.

    No flow, no competition, no allocation: plain linear attention, as a bound for the forms.
    All channels-first, which costs ONNX Runtime least.

    Args:
        q: logits (B, L, H, D). k: (B, S, H, D). v: (B, S, H, M).
        *arguments: the operator's arguments after v.

    Returns:
        (B, L, H, M).
    """
    q, k = _features(q, k, arguments)
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    return ((v @ k.transpose(2, 3)) @ q).permute(0, 3, 1, 2)


def absorbed_products(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """Return φ(q) (φ(k)ᵀ x Wᵥᵀ) Wₒᵀ + bₒ: :func:`features_and_products` of a whole layer.

    Both projections are in the products, as in the form ``channel_first_absorbed``, and
    v has no bias: the two features, four dense products of the projections' size, two
    transposes in and one out. This costs XNNPACK least.

    Args:
        q: logits (B, L, H, D). k: (B, S, H, D). x: what v is projected from, (B, S, C).
        value_weight: (H·M, C). out_weight: (C_out, H·M). out_bias: (C_out,) or None.
        *arguments: the operator's arguments after v.

    Returns:
        (B, L, C_out).
    """
    q, k = (y.permute(0, 2, 3, 1) for y in _features(q, k, arguments))
    return _absorbed(q, k, x, value_weight, out_weight, out_bias)


def absorbed_passes(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """Return :func:`absorbed_products` with each pass over the tokens that the flows need besides.

    With t(y) the sum over tokens: eight passes over q or k that multiply, eight that sum, and
    nothing else. Each is needed:

    * t(q) and t(k), for they are in every flow;
    * q·t(k) and k·t(q), the incoming and the outgoing flow;
    * t(q / incoming) and t(k / outgoing), which want those flows of all tokens first;
    * the products of q and k with these two, the conserved flows;
    * k times its competition's weight and q times its allocation, which want those.

    XNNPACK has no operator that multiplies by a computed tensor and sums; its batch product
    does, but packs the whole right side: two rows in one product for both dots of q (or of k)
    took at 3,136 tokens of 96 what the two multiplications and sums take. What is left out works
    on one number a head and token or less (ε, division, sigmoid, clamp, exp, their mean), and v's
    bias with its sum over k's tokens. So the result is no attention: quotients are products here.

    Args and Returns: as :func:`absorbed_products`.
    """

    def total(y: Tensor) -> Tensor:  # (B,H,D,N) -> (B,H,D,1)
        return y.sum(dim=3, keepdim=True)

    def dot(y: Tensor, t: Tensor) -> Tensor:  # (B,H,D,N), (B,H,D,1) -> (B,H,1,N)
        return (y * t).sum(dim=2, keepdim=True)

    q, k = (y.permute(0, 2, 3, 1) for y in _features(q, k, arguments))
    incoming, outgoing = dot(q, total(k)), dot(k, total(q))
    allocation, weight = dot(q, total(k * outgoing)), dot(k, total(q * incoming))
    return _absorbed(q * allocation, k * weight, x, value_weight, out_weight, out_bias)


def _absorbed(
    q: Tensor, k: Tensor, x: Tensor, value_weight: Tensor, out_weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return q (kᵀ x Wᵥᵀ) Wₒᵀ + b of features (B, H, D, N)."""
    heads = (q.shape[1], value_weight.shape[0] // q.shape[1])
    context = (k.flatten(1, 2) @ x).unflatten(1, (heads[0], -1))  # (B, H, D, C)
    context = context @ value_weight.unflatten(0, heads).transpose(1, 2)
    context = context @ out_weight.transpose(0, 1).unflatten(0, heads)
    y = q.flatten(1, 2).transpose(1, 2) @ context.flatten(1, 2)
    return y if bias is None else y + bias


def _features(q: Tensor, k: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    from flowexport.ops.flow_attention.op import variant_of
    from flowexport.ops.flow_attention.reference import feature_map

    variant = variant_of(arguments)
    return feature_map(q, variant), feature_map(k, variant)


def causal_products(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Return Σ_{s≤t} (φ(q_t) · φ(k_s)) v_s: causal linear attention, without any flow.

    In the chunks and segments of the form ``causal_scan``, as a bound for the causal forms:
    q kᵀ masked, times v, plus q times what the earlier chunks' kᵀ v sum to.

    Args and Returns: as :func:`features_and_products`.
    """
    return _causal(q, k, v, arguments, flows=False)


def causal_passes(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Return :func:`causal_products` with each pass over the tokens that the flows need besides.

    With P the masked q kᵀ of a chunk, F its other triangle, and e(y) the sum of y over the
    earlier chunks:

    * the flows in, P 1 + q e(k), and out, 1ᵀ F + e(q) kᵀ;
    * the conserved ones, P y + q e(k y) and x F + e(q x) kᵀ, which want those first;
    * v times its competition, the result times its allocation.

    A vector takes a product of its own, for a product of two costs ONNX Runtime three times one's
    (32 µs to 97 at eight heads of 64). What is left out works on one number a head and token: ε, n,
    divisions, exp, sigmoid, and the prefix sum of the weights. So the result is no attention:
    quotients are products here.

    Args and Returns: as :func:`features_and_products`.
    """
    return _causal(q, k, v, arguments, flows=True)


def _causal(q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...], *, flows: bool) -> Tensor:
    import torch

    from flowexport.ops.flow_attention.causal import CHUNK, carried, padded, segment_size
    from flowexport.ops.segments import over_segments

    batch, length, heads, width = q.shape
    value_width, size = v.shape[3], segment_size(length)

    def step(
        carry: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        behind: list[Tensor] = []

        def before(x: Tensor) -> Tensor:
            sums, following = carried(x, carry[len(behind)], size // CHUNK)
            behind.append(following)
            return sums

        q, k, v = (x.reshape(-1, CHUNK, heads, x.shape[3]) for x in (q, k, v))
        q, k = _features(q, k, arguments)
        q, kt, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        mask = torch.ones(CHUNK, CHUNK, dtype=q.dtype)
        product = q @ kt
        past = product * mask.tril()
        if flows:
            future = product * mask.triu()
            x = past.sum(dim=3, keepdim=True) + q @ before(kt.sum(dim=3, keepdim=True))
            y = future.sum(dim=2, keepdim=True) + before(q.sum(dim=2, keepdim=True)) @ kt
            row, column = x.reshape(y.shape), y.reshape(x.shape)
            sink = past @ column + q @ before(kt @ column)
            source = row @ future + before(row @ q) @ kt
            v = v * source.reshape(x.shape)
        context = before(kt @ v)
        result = past @ v + q @ context  # (BG, H, c, M)
        return (result * sink if flows else result), tuple(behind)

    tokens = padded(q, k, v, -(-length // size) * size)[:3]
    rows = heads * width
    widths = ([rows] * 4 if flows else []) + [rows * value_width]
    carry = tuple(q.new_zeros(batch, n) for n in widths)
    return over_segments(step, carry, tokens, size)[:, :length]


def published_program(subject: Subject, path: Path) -> None:
    """Save a subject's module as :func:`save_published` does."""
    save_published(subject.module, subject.spec.inputs, subject.spec.name, path)


def save_published(module: nn.Module, inputs: Sequence[TensorSpec], name: str, path: Path) -> None:
    """Save a module with each attention as the published equations, in plain torch operators.

    ``torch.export`` of the eager module at batch 1, which is what the stock
    exporters do first; none of our passes has seen it.

    Raises:
        LoweringError: ``torch.export`` refused the model.
    """
    import torch

    from flowexport.lowering.replaced import Replaced

    functions = {op.overload: op.forms["published"] for op in installed_ops()}
    example = tuple(
        torch.zeros([int(d) for d in s.static().shape], dtype=getattr(torch, s.dtype))
        for s in inputs
    )
    try:
        with torch.no_grad():
            exported = torch.export.export(Replaced(module, functions), example)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise LoweringError(
            f"bench {name}: torch.export refused the published form: {type(error).__name__}: {line}"
        ) from error
    torch.export.save(exported, path)


def lowered(subject: Subject, *, attention: bool) -> LoweredProgram:
    """Lower the model as a conversion does, or with :func:`projections_only` for attention."""
    import copy

    from flowexport.lowering import lower
    from flowexport.lowering.replaced import Replaced

    ops = installed_ops()
    module = copy.deepcopy(subject.module)
    if not attention:
        module = Replaced(module, {op.overload: projections_only for op in ops})
    spec = subject.spec
    return lower(
        module,
        spec.inputs,
        spec.output_names,
        name=spec.name,
        ops=ops,
        labels=spec.labels,
        preprocessing=spec.preprocessing,
        recipe_sha256=subject.recipe_sha256,
    )
