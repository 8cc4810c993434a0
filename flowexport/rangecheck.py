"""Whether each attention of a model survives a precision on a target, before any conversion.

The float32 model runs once on each sample; the logits that reach an attention
are put through its form with every result rounded to the target's arithmetic
(:mod:`flowexport.ops.flow_attention.ranges`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import ConversionError, UnknownNameError
from flowexport.core.types import Dataset, TensorSpec
from flowexport.registry import OPS
from flowexport.resolve import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from flowexport.lowering import LoweredProgram
    from flowexport.ops.descriptor import AttentionSite
    from flowexport.ops.flow_attention.ranges import LogitRange, SiteVerdict

PRECISIONS = ("fp16", "bf16", "fp32")
# Every arithmetic that a precision may mean on some device.
ARITHMETICS = {"fp16": ("fp16", "fp16_ftz"), "bf16": ("bf16",), "fp32": ("fp32",)}
# Targets whose devices keep fp16 subnormals; the Neural Engine's keeping is not known.
KEEPS_SUBNORMALS = ("onnx", "tensorrt")
# Store short weights and compute in float32.
COMPUTES_WIDE = ("tflite",)
# TensorRT engines are built from the ONNX target's file.
TABLE_OF = {"tensorrt": "onnx"}
SAMPLES = 2
# Values of the largest tensor of a check: the causal reference holds N·H·D·M of them.
MOST_VALUES = 2**22


@dataclass(frozen=True)
class Calls:
    """What reached one attention: its site, the calibrated ranges, and the logits by sample.

    ``verdicts`` keeps what was found, by form and arithmetic: targets share most of it.
    """

    site: AttentionSite
    ranges: Mapping[str, LogitRange]
    samples: tuple[tuple[Tensor, Tensor, Tensor], ...]
    verdicts: dict[tuple[str, str], SiteVerdict] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class LayerCheck:
    """One attention on one target.

    Attributes:
        form, reason: what lowering takes there, and why.
        published, chosen: verdict by arithmetic, the worst over the samples.
    """

    site: AttentionSite
    ranges: Mapping[str, LogitRange]
    form: str
    reason: str
    published: Mapping[str, SiteVerdict]
    chosen: Mapping[str, SiteVerdict]

    def to_json(self) -> dict[str, Any]:
        def told(verdicts: Mapping[str, SiteVerdict]) -> dict[str, Any]:
            return {a: _finite(v.to_json()) for a, v in verdicts.items()}

        return {
            "module": self.site.module_path,
            "tokens": [self.site.q_shape[1], self.site.k_shape[1]],
            "heads": self.site.k_shape[2],
            "width": self.site.k_shape[3],
            "ranges": {name: dict(r.__dict__) for name, r in self.ranges.items()},
            "form": self.form,
            "reason": self.reason,
            "published": told(self.published),
            "chosen": told(self.chosen),
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
    """

    target: str
    precision: str
    decisive: tuple[str, ...]
    layers: tuple[LayerCheck, ...]
    taken: str | None
    safe: bool
    unchecked: tuple[str, ...]
    action: str

    @property
    def published_safe(self) -> bool:
        """Whether the published form would have done."""
        return all(_safe(layer.published, self.decisive) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
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


def calibration_samples(
    inputs: Sequence[TensorSpec],
    dataset: Dataset | None,
    given: Mapping[str, np.ndarray] | None = None,
    count: int = SAMPLES,
) -> tuple[list[dict[str, np.ndarray]], str]:
    """Return feeds of one sample each, and what they are in words.

    Args:
        given: the user's samples, one array an input, samples first.
        dataset: the model's data set, or None.

    Returns:
        Given samples, else the data set's (of different classes), else
        standard normal ones, which say less: the text tells.

    Raises:
        InputError: the samples do not fit the model's inputs.
    """
    from flowexport.parity import make_cases

    if given is not None:
        size = len(next(iter(given.values()), ()))
        dataset = Dataset("given", given, np.zeros(size, np.int64), (), "the user")
    cases = make_cases(inputs, dataset)
    kind = "random-" if dataset is None else "sample-"
    feeds = [f for name, f in cases.items() if name.startswith(kind)][:count]
    if dataset is None:
        return feeds, f"{len(feeds)} random samples (there is no data set)"
    return feeds, f"{len(feeds)} samples of {dataset.name}"


def calibrate(
    program: LoweredProgram, feeds: Sequence[Mapping[str, np.ndarray]]
) -> tuple[Calls, ...]:
    """Run a float32 program and keep what reaches each attention, in execution order.

    Args:
        program: with attention nodes, in float32.
        feeds: one mapping a sample.
    """
    import torch

    from flowexport.ops.flow_attention.ranges import LogitRange

    overloads = {op.overload for op in OPS.working().values()}
    runs: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in overloads:
                runs[-1].append(tuple(x.detach().clone() for x in args[:3]))
            return super().call_function(target, args, kwargs)

    graph = program.exported.module(check_guards=False)
    assert isinstance(graph, torch.fx.GraphModule)
    with torch.no_grad():
        for sample in feeds:
            runs.append([])
            tensors = [torch.from_numpy(np.array(sample[s.name])) for s in program.inputs]
            Recorder(graph).run(*tensors)
    calls = []
    for i, site in enumerate(program.attentions):
        samples = tuple(run[i] for run in runs)
        ranges = {
            name: LogitRange.of(torch.cat([s[j].flatten() for s in samples]))
            for j, name in enumerate("qkv")
        }
        calls.append(Calls(site, ranges, samples))
    return tuple(calls)


def calibrate_subject(
    subject: Subject, given: Mapping[str, np.ndarray] | None = None
) -> tuple[tuple[Calls, ...], str]:
    """Lower a model in float32 and calibrate its attentions.

    Args:
        given: the user's samples; see :func:`calibration_samples`.

    Returns:
        What reached each attention, and the samples in words.
    """
    from flowexport.lowering import lower

    spec = subject.spec
    feeds, told = calibration_samples(spec.inputs, subject.dataset, given)
    program = lower(
        copy.deepcopy(subject.module),
        spec.inputs,
        spec.output_names,
        name=spec.name,
        ops=list(OPS.working().values()),
    )
    return calibrate(program, feeds), told


def check_target(
    target: str, precision: str, calls: Sequence[Calls], *, pinned: str | None = None
) -> TargetCheck:
    """Check every attention in the published form and in the one that lowering takes.

    Args:
        target: a target's name; decides form and arithmetics.
        precision: ``fp16``, ``bf16`` or ``fp32``.
        calls: of :func:`calibrate`.
        pinned: the form that the recipe insists on, or None.

    Returns:
        The verdicts. Where the chosen form is not safe and nothing is pinned,
        a form that is safe at every layer is taken if there is one.

    Raises:
        UnknownNameError: no such precision.
    """
    from flowexport.ops.flow_attention.lowered import DESCRIPTOR, FORMS, applicable
    from flowexport.ops.flow_attention.op import variant_of

    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS, where="check")
    decisive = arithmetics(target, precision)
    told = tuple(dict.fromkeys([*decisive, *ARITHMETICS[precision]]))
    if target in COMPUTES_WIDE:
        told = decisive
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
        layers.append(LayerCheck(call.site, call.ranges, form, reason, published, chosen))
    bad = [layer for layer in layers if not _safe(layer.chosen, decisive)]
    taken = None
    if bad and pinned is None:
        forms = [set(applicable(variant_of(c.site.arguments))) for c in known]
        # In the table's order, which has the published form first: it is tried last.
        candidates = [f for f in reversed(list(FORMS)) if all(f in names for names in forms)]
        taken = next(
            (
                form
                for form in candidates
                if all(_worst(c, form, a).safe for c in known for a in decisive)
            ),
            None,
        )
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
            f" {_name(first.site)} in the form {first.form}: {why.reason}"
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
        f" {len(lost)} of {len(layers)} in {verdict.arithmetic}: {_name(lost[0].site)}:"
        f" {verdict.reason}."
    )


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
