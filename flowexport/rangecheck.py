"""Whether each attention of a model survives a precision on a target, before any conversion.

The float32 model runs once on each sample; the logits that reach an attention
are put through its form with every result rounded to the target's arithmetic
(:mod:`flowexport.ops.flow_attention.ranges`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import ConversionError, UnknownNameError
from flowexport.core.types import FORWARD
from flowexport.logits import Calls

if TYPE_CHECKING:
    from torch import Tensor

    from flowexport.ops.descriptor import AttentionSite
    from flowexport.ops.flow_attention.ranges import LogitRange, SiteVerdict

PRECISIONS = ("fp16", "bf16", "fp32")
SCHEMA = "flowexport.check/1"
# Every arithmetic that a precision may mean on some device.
ARITHMETICS = {"fp16": ("fp16", "fp16_ftz"), "bf16": ("bf16",), "fp32": ("fp32",)}
# Told too, and decisive where asked for: no device here is known to accumulate in half.
RARE = {"fp16": ("fp16_acc16",)}
# Targets whose devices keep fp16 subnormals; the Neural Engine's keeping is not known.
KEEPS_SUBNORMALS = ("onnx", "tensorrt")
# Store short weights and compute in float32.
COMPUTES_WIDE = ("tflite",)
# TensorRT engines are built from the ONNX target's file.
TABLE_OF = {"tensorrt": "onnx"}
# Values of the largest tensor of a check: the causal reference holds N·H·D·M of them.
MOST_VALUES = 2**22


@dataclass(frozen=True)
class LayerCheck:
    """One attention on one target.

    Attributes:
        function: of the artifact, ``forward`` unless it is exported at several lengths.
        form, reason: what lowering takes there, and why.
        published, chosen: verdict by arithmetic, the worst over the samples.
        replacement: of the form that is taken instead, where one is; else None.
    """

    site: AttentionSite
    ranges: Mapping[str, LogitRange]
    form: str
    reason: str
    published: Mapping[str, SiteVerdict]
    chosen: Mapping[str, SiteVerdict]
    function: str = FORWARD
    replacement: Mapping[str, SiteVerdict] | None = None

    @property
    def name(self) -> str:
        """Return the module's path and, beside ``forward``, the function."""
        name = _name(self.site)
        return name if self.function == FORWARD else f"{name} ({self.function})"

    def to_json(self) -> dict[str, Any]:
        def told(verdicts: Mapping[str, SiteVerdict]) -> dict[str, Any]:
            return {a: _finite(v.to_json()) for a, v in verdicts.items()}

        return {
            "module": self.site.module_path,
            "function": self.function,
            "tokens": [self.site.q_shape[1], self.site.k_shape[1]],
            "heads": self.site.k_shape[2],
            "width": self.site.k_shape[3],
            "ranges": {name: dict(r.__dict__) for name, r in self.ranges.items()},
            "form": self.form,
            "reason": self.reason,
            "published": told(self.published),
            "chosen": told(self.chosen),
            "replacement": None if self.replacement is None else told(self.replacement),
        }


@dataclass(frozen=True)
class TargetCheck:
    """All attentions of a model on one target.

    Attributes:
        decisive: arithmetics that the target's devices compute in; a form
            must be safe in each. Verdicts in others are for information.
        taken: form that replaces the chosen one everywhere because it is not
            safe, or None.
        safe: whether the conversion may go on.
        unchecked: attentions of operators that no range check knows.
        action: one sentence: what the toolkit does.
        samples: what the ranges were calibrated on, in words.
    """

    target: str
    precision: str
    decisive: tuple[str, ...]
    layers: tuple[LayerCheck, ...]
    taken: str | None
    safe: bool
    unchecked: tuple[str, ...]
    action: str
    samples: str = ""

    @property
    def taken_because(self) -> str | None:
        """Return why another form than the table's is taken, for the artifact; None if none is."""
        if self.taken is None:
            return None
        arithmetic = next(
            a for layer in self.layers for a in self.decisive if not layer.chosen[a].safe
        )
        return f"range check: the table's form is not safe in {arithmetic}, this one is"

    @property
    def published_safe(self) -> bool:
        """Whether the published form would have done."""
        return all(_safe(layer.published, self.decisive) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "samples": self.samples,
            "decisive": list(self.decisive),
            "published_safe": self.published_safe,
            "safe": self.safe,
            "taken": self.taken,
            "action": self.action,
            "unchecked": list(self.unchecked),
            "layers": [layer.to_json() for layer in self.layers],
        }

    def require_safe(self, model: str) -> None:
        """Raise ConversionError unless the conversion may go on."""
        if not self.safe:
            raise ConversionError(
                f"convert {self.target} {model}: {self.action}",
                fix="--precision fp32, or --no-check to convert all the same",
            )


def arithmetics(target: str, precision: str) -> tuple[str, ...]:
    """Return what a target computes in; of each, a form must be safe."""
    if target in COMPUTES_WIDE:
        return ("fp32",)
    if precision == "fp16" and target in KEEPS_SUBNORMALS:
        return ("fp16",)
    return ARITHMETICS[precision]


def check_target(
    target: str,
    precision: str,
    calls: Sequence[Calls],
    *,
    pinned: str | None = None,
    require: Sequence[str] = (),
    samples: str = "",
) -> TargetCheck:
    """Check every attention in the published form and in the one that lowering takes.

    Args:
        target: a target's name; decides form and arithmetics.
        precision: ``fp16``, ``bf16`` or ``fp32``.
        calls: of :func:`calibrate`.
        pinned: the form that the recipe insists on, or None.
        require: more arithmetics that a form must be safe in, on targets that compute in
            ``precision``: ``fp16_acc16`` for a device that accumulates in half.
        samples: what ``calls`` were calibrated on, in words.

    Returns:
        The verdicts. Where the chosen form is not safe and nothing is pinned,
        a form that is safe at every layer is taken if there is one.

    Raises:
        UnknownNameError: no such precision, or no such arithmetic in it.
    """
    from flowexport.ops.flow_attention.lowered import DESCRIPTOR, FORMS, misfit

    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS, where="check")
    possible = (*ARITHMETICS[precision], *RARE.get(precision, ()))
    for name in require:
        if name not in possible:
            raise UnknownNameError("arithmetic", name, possible, where=f"check {precision}")
    told = decisive = arithmetics(target, precision)
    if target not in COMPUTES_WIDE:
        decisive = tuple(dict.fromkeys([*decisive, *require]))
        told = tuple(dict.fromkeys([*decisive, *possible]))
    known = [c for c in calls if c.site.op == DESCRIPTOR.name]
    unchecked = tuple(_name(c.site) for c in calls if c.site.op != DESCRIPTOR.name)
    layers = []
    for call in known:
        form, reason = pinned, "pinned by the recipe"
        if form is None:
            table = TABLE_OF.get(target, target)
            wide = target in COMPUTES_WIDE
            choice = DESCRIPTOR.choose(table, "fp32" if wide else precision, call.site)
            form, reason = choice.form, choice.reason
        published = {a: _worst(call, "published", a) for a in told}
        chosen = {a: _worst(call, form, a) for a in told}
        layers.append(
            LayerCheck(call.site, call.ranges, form, reason, published, chosen, call.function)
        )
    bad = [layer for layer in layers if not _safe(layer.chosen, decisive)]
    taken: str | None = None
    if bad and pinned is None:
        # In the table's order, which has the published form first: it is tried last.
        candidates = [f for f in reversed(list(FORMS)) if not any(misfit(f, c.site) for c in known)]
        taken = next(
            (
                form
                for form in candidates
                if all(_worst(c, form, a).safe for c in known for a in decisive)
            ),
            None,
        )
    if taken is not None:
        layers = [
            replace(layer, replacement={a: _worst(call, taken, a) for a in told})
            for call, layer in zip(known, layers, strict=True)
        ]
    action = _action(precision, layers, bad, taken, pinned, decisive)
    return TargetCheck(
        target=target,
        precision=precision,
        decisive=decisive,
        layers=tuple(layers),
        taken=taken,
        safe=not bad or taken is not None,
        unchecked=unchecked,
        action=action,
        samples=samples,
    )


def _action(
    precision: str,
    layers: Sequence[LayerCheck],
    bad: Sequence[LayerCheck],
    taken: str | None,
    pinned: str | None,
    decisive: Sequence[str],
) -> str:
    if not layers:
        return "there is no attention to check."
    if bad:
        first = bad[0]
        why = next(first.chosen[a] for a in decisive if not first.chosen[a].safe)
        text = (
            f"{len(bad)} of {len(layers)} attentions are not safe in {why.arithmetic}:"
            f" {first.name} in the form {first.form}: {why.reason}"
        )
        if taken is not None:
            return f"{text}; takes {taken} instead."
        return f"{text}; expected a safe form" + (", but this one is pinned." if pinned else ".")
    lost = [layer for layer in layers if not _safe(layer.published, decisive)]
    forms = ", ".join(sorted({layer.form for layer in layers}))
    if not lost:
        return f"takes {forms}; the published form would be safe too in {', '.join(decisive)}."
    verdict = next(lost[0].published[a] for a in decisive if not lost[0].published[a].safe)
    return (
        f"takes {forms}, safe at every layer in {precision}; the published form is not safe at"
        f" {len(lost)} of {len(layers)} in {verdict.arithmetic}: {lost[0].name}:"
        f" {verdict.reason}."
    )


def check_document(model: str, found: Mapping[str, TargetCheck]) -> dict[str, Any]:
    """Return what ``flowexport check --json`` prints; ``report/schemas/check.json`` tells it."""
    return {
        "schema": SCHEMA,
        "model": model,
        "safe": all(entry.safe for entry in found.values()),
        "targets": {name: entry.to_json() for name, entry in found.items()},
    }


def _name(site: AttentionSite) -> str:
    """Return the module's path, or the operator where the model itself is the module."""
    return site.module_path or site.op


def _safe(verdicts: Mapping[str, SiteVerdict], decisive: Sequence[str]) -> bool:
    return all(verdicts[a].safe for a in decisive)


def _worst(call: Calls, form: str, arithmetic: str) -> SiteVerdict:
    from flowexport.ops.flow_attention.ranges import check_site

    if (form, arithmetic) not in call.verdicts:
        verdicts = [
            check_site(call.site, *_fewer_heads(call.site, *sample), form, arithmetic)
            for sample in call.samples
        ]
        worst = max(verdicts, key=lambda v: (not v.safe, v.error))
        call.verdicts[form, arithmetic] = worst
    return call.verdicts[form, arithmetic]


def _fewer_heads(
    site: AttentionSite, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the heads of the widest logits where a causal check would fill the memory.

    The heads of a causal variant do not see each other.
    """
    from flowexport.ops.flow_attention.op import variant_of

    each = q.shape[0] * q.shape[1] * q.shape[3] * v.shape[3]
    count = max(1, MOST_VALUES // max(each, 1))
    if count >= q.shape[2] or not variant_of(site.arguments).causal:
        return q, k, v
    width = q.abs().amax(dim=(0, 1, 3)) + k.abs().amax(dim=(0, 1, 3))
    heads = width.topk(count).indices
    return q[:, :, heads], k[:, :, heads], v[:, :, heads]


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a verdict for JSON, which has no infinity: None where the result is not finite."""
    return {**entry, "error": entry["error"] if np.isfinite(entry["error"]) else None}
