"""What a conversion will do, settled and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowexport.bundle import Staging
from flowexport.calibration import require_calibration
from flowexport.core.errors import (
    FlowExportError,
    InputError,
    RecipeError,
    UnavailableError,
    UnknownNameError,
)
from flowexport.core.pixels import Pixels, round_dataset
from flowexport.core.types import Availability, Options, Precision, TensorSpec, float_precision
from flowexport.logits import calibrate_subject
from flowexport.pinned import check_pinned
from flowexport.rangecheck import (
    COMPUTES_WIDE,
    TargetCheck,
    check_target,
)
from flowexport.recipes import Calibration, Recipe, Weights
from flowexport.registry import TARGETS
from flowexport.resolve import Subject, find_recipe, resolve


@dataclass(frozen=True)
class Plan:
    """One conversion.

    Attributes:
        options: what will be converted, by target.
        not_run: targets of the recipe that cannot be converted here, with the reason.
        checks: by target that computes in half, whether its attentions survive that.
        pixels: inputs that an artifact takes as 8-bit images; the cases are whole pixels then.
    """

    recipe: Recipe
    subject: Subject
    out: Path
    options: Mapping[str, Options]
    not_run: Mapping[str, Availability]
    threads: int
    checks: Mapping[str, TargetCheck] = field(default_factory=dict)
    pixels: Mapping[str, Pixels] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as ``convert --dry-run --json`` prints it."""
        spec, lengths = self.subject.spec, self.subject.lengths
        return {
            "recipe": self.recipe.name,
            "recipe_sha256": self.subject.recipe_sha256,
            "model": str(self.recipe.model),
            "parameters": self.subject.parameters,
            "weights_sha256": self.subject.weights_sha256,
            "inputs": [s.to_json() for s in spec.inputs],
            "outputs": list(spec.output_names),
            "dataset": self.subject.dataset and self.subject.dataset.name,
            "calibration": self.subject.calibration and self.subject.calibration.name,
            "streaming": None if lengths is None else {"lengths": list(lengths)},
            "buckets": None if self.subject.buckets is None else list(self.subject.buckets),
            "out": str(self.out),
            "targets": {
                name: {
                    "precision": o.precision.value,
                    "options": dict(o.extra),
                    "keep_float": list(o.keep_float),
                    "tolerance": dict(self.recipe.tolerance(name, o.precision)),
                    "range_check": self.checks[name].action if name in self.checks else None,
                }
                for name, o in self.options.items()
            },
            "not_run": {n: {"reason": a.reason, "fix": a.fix} for n, a in self.not_run.items()},
        }


def make_plan(
    source: str | Path | Recipe,
    *,
    targets: Sequence[str] = (),
    precision: str | Precision | None = None,
    weights: str | Path | None = None,
    inputs: Sequence[TensorSpec] = (),
    out: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    require: Sequence[str] = (),
    check: bool = True,
    calibration: str | Path | None = None,
    max_accuracy_drop: float | None = None,
    plugin: bool = True,
) -> Plan:
    """Settle what will be converted, and build the model; see :func:`flowexport.convert`.

    Raises:
        FlowExportError: whatever is wrong with the recipe, the names, the weights
            or the shapes; UnavailableError for a target asked for by ``targets``
            or ``require`` that cannot be converted here; ConversionError where
            no form of an attention survives the precision.
    """
    for name in (*targets, *require):
        if name not in TARGETS.names():
            raise UnknownNameError("target", name, TARGETS.names())
    if precision is not None and precision not in list(Precision):
        raise UnknownNameError("precision", str(precision), [p.value for p in Precision])
    if threads is not None and threads < 1:
        raise InputError(f"threads: has {threads}; expected 1 or more.")
    recipe = override(
        find_recipe(source), precision, weights, inputs, calibration, max_accuracy_drop
    )
    # --target asks for the named ones; --require adds to what the recipe has.
    chosen = list(dict.fromkeys([*(targets or recipe.targets or TARGETS.names()), *require]))
    options: dict[str, Options] = {}
    not_run: dict[str, Availability] = {}
    for name in chosen:
        availability = _check_target(recipe, name)
        if availability.converts:
            options[name] = recipe.options(name)
            if not plugin and getattr(TARGETS.get(name), "has_plugin", False):
                extra = {**options[name].extra, "plugin": False}
                options[name] = replace(options[name], extra=extra)
        elif name in targets or name in require:
            raise UnavailableError(
                f"convert {name} {recipe.name}: the target is not available:"
                f" {(availability.reason or 'no reason given').rstrip('.')}.",
                fix=availability.fix,
            )
        else:
            not_run[name] = availability
    if not options:
        reasons = "; ".join(f"{n}: {(a.reason or '').rstrip('.')}" for n, a in not_run.items())
        raise UnavailableError(
            f"convert {recipe.name}: no target is available ({reasons}).",
            fix="`flowexport doctor` shows what mends each",
        )
    place = (Path(out) if out is not None else Path("out") / recipe.name).absolute()
    Staging(place, force=force).check()
    subject = resolve(recipe, calibrated=require_calibration(recipe, list(options)))
    _check_kept(recipe, subject, options)
    check_pinned(subject, options)
    if max_accuracy_drop is not None and subject.dataset is None:
        raise InputError(
            f"convert {recipe.name}: max-accuracy-drop is {max_accuracy_drop:g} points and the"
            " recipe has no evaluation set; expected one, on which the accuracy is counted.",
            fix="`evaluation: {dataset: NAME}` in the recipe, or leave --max-accuracy-drop out",
        )
    named = {*targets, *require, *(recipe.targets or ())}
    if subject.lengths is not None:
        _check_streaming(recipe, options, not_run, named)
    if len(subject.buckets or ()) > 1:
        _check_functions(recipe, options, not_run, named, "buckets", "hold several lengths")
    pixels = _check_model(recipe, subject, options)
    if pixels and subject.dataset is not None:
        subject = replace(subject, dataset=round_dataset(subject.dataset, pixels))
    checks = _check_ranges(subject, options) if check else {}
    for name, found in checks.items():
        found.require_safe(subject.spec.name)
        if found.taken is not None:
            extra = {**options[name].extra, "form": found.taken}
            reason = found.taken_because
            options[name] = replace(options[name], extra=extra, form_reason=reason)
    return Plan(
        recipe=recipe,
        subject=subject,
        out=place,
        options=options,
        not_run=not_run,
        threads=threads or recipe.bench.threads,
        checks=checks,
        pixels=pixels,
    )


def _check_model(
    recipe: Recipe, subject: Subject, options: Mapping[str, Options]
) -> dict[str, Pixels]:
    """Have each target refuse what this model cannot have in its format.

    Returns:
        The inputs that some target's artifact takes as 8-bit images.
    """
    several = subject.lengths is not None or len(subject.buckets or ()) > 1
    pixels: dict[str, Pixels] = {}
    for name, asked in options.items():
        check = getattr(TARGETS.get(name), "check_model", None)
        if check is None:
            continue
        try:
            pixels |= check(subject.spec, asked, several)
        except FlowExportError as error:
            where = recipe.where("targets", name)
            raise RecipeError(f"{where}: {error.message}", fix=error.fix) from error
    return pixels


def _check_ranges(subject: Subject, options: Mapping[str, Options]) -> dict[str, TargetCheck]:
    """Check the attentions for each target that computes them in half.

    Quantised precisions leave them in floating point: what that is decides. A
    fused plugin that the recipe insists on sums in float32 whatever its inputs are.
    """
    computed = {n: float_precision(TARGETS.get(n), o.precision) for n, o in options.items()}
    half = {
        name: o
        for name, o in options.items()
        if computed[name] is Precision.FP16
        and name not in COMPUTES_WIDE
        and not (o.extra.get("plugin") is True and getattr(TARGETS.get(name), "has_plugin", False))
    }
    if not half:
        return {}
    calls, samples = calibrate_subject(subject)
    return {
        name: check_target(
            name, computed[name].value, calls, pinned=o.extra.get("form"), samples=samples
        )
        for name, o in half.items()
    }


def _check_kept(recipe: Recipe, subject: Subject, options: Mapping[str, Options]) -> None:
    """Raise InputError for a ``keep_float`` that names no module of the model."""
    from flowexport.lowering.quantisation import matches

    modules = [name for name, _ in subject.module.named_modules() if name]
    for name, asked in options.items():
        for pattern in asked.keep_float:
            if not any(matches(module, [pattern]) for module in modules):
                raise InputError(
                    f"{recipe.where('keep_float')}: keep_float of {name} has {pattern!r}, which"
                    " names no module of the model; expected module paths or globs.",
                    fix="`flowexport sensitivity` prints the paths of the layers",
                )


def check_points(points: float) -> None:
    """Raise InputError unless this is a number of points of accuracy."""
    if not 0 <= points <= 100:
        raise InputError(f"max-accuracy-drop: has {points:g}; expected points in [0, 100].")


def override(
    recipe: Recipe,
    precision: str | Precision | None = None,
    weights: str | Path | None = None,
    inputs: Sequence[TensorSpec] = (),
    calibration: str | Path | None = None,
    max_accuracy_drop: float | None = None,
) -> Recipe:
    """Return a recipe with what the command line says instead of it.

    Args:
        calibration: a data set's name, or a ``.npz`` file.
        max_accuracy_drop: points (0..100).

    Raises:
        InputError: an input is given twice, or the drop is out of its range.
    """
    if calibration is not None:
        file = str(calibration).endswith(".npz")
        recipe = replace(
            recipe,
            calibration=Calibration(file=Path(calibration).absolute())
            if file
            else Calibration(dataset=str(calibration)),
        )
    if max_accuracy_drop is not None:
        check_points(max_accuracy_drop)
        recipe = replace(recipe, max_accuracy_drop=max_accuracy_drop)
    if precision is not None:
        recipe = recipe.with_precision(Precision(precision))
    if weights is not None:
        recipe = replace(recipe, weights=Weights(file=Path(weights).absolute()))
    if inputs:
        names = [s.name for s in inputs]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise InputError(f"input {twice.pop()}: is given twice; expected one shape an input.")
        kept = [s for s in recipe.inputs or () if s.name not in names]
        recipe = replace(recipe, inputs=(*kept, *inputs))
    return recipe


def _check_streaming(
    recipe: Recipe,
    options: dict[str, Options],
    not_run: dict[str, Availability],
    named: set[str],
) -> None:
    """Refuse what cannot carry a state; a target that nobody named is left out with the reason."""
    for name, asked in options.items():
        where = recipe.where("targets", name)
        if asked.precision.quantised:
            raise InputError(
                f"{where}: streaming to {name} has precision {asked.precision.value}; expected"
                " fp32 or fp16.",
                fix="--precision fp16, or `streaming: false` for forward alone",
            )
    carry = "carry the state of a causal model's step"
    _check_functions(recipe, options, not_run, named, "streaming", carry)


def _check_functions(
    recipe: Recipe,
    options: dict[str, Options],
    not_run: dict[str, Availability],
    named: set[str],
    key: str,
    what: str,
) -> None:
    """Refuse a target of one function only, or leave it out where nobody named it."""
    able = [n for n in TARGETS.names() if n not in not_run and _streams(n)]
    for name in [n for n in options if not _streams(n)]:
        reason = f"target {name} cannot {what}"
        without = "`streaming: false` for forward alone" if key == "streaming" else f"no `{key}`"
        fix = f"choose one of: {', '.join(able)}; or {without}"
        if name in named:
            where = recipe.where("targets", name)
            raise InputError(f"{where}: {reason}; expected a target that can.", fix=fix)
        del options[name]
        not_run[name] = Availability(False, False, reason=reason, fix=fix)


def _streams(name: str) -> bool:
    try:
        return bool(getattr(TARGETS.get(name), "streams", False))
    except UnavailableError:
        return False


def _check_target(recipe: Recipe, name: str) -> Availability:
    """Refuse what the target does not support; say whether it can be converted here."""
    try:
        target = TARGETS.get(name)
    except UnavailableError as error:
        return Availability(False, False, reason=error.message, fix=error.fix)
    options = recipe.options(name)
    where = recipe.where("targets", name)
    if options.precision not in target.precisions:
        supported = ", ".join(p.value for p in target.precisions)
        raise InputError(
            f"{where}: target {name} has precision {options.precision.value};"
            f" expected one of: {supported}.",
            fix=_precision_fix(recipe, name, options.precision),
        )
    try:
        target.validate(options)
    except FlowExportError as error:
        raise RecipeError(f"{where}: {error.message}", fix=error.fix) from error
    recipe.tolerance(name, options.precision)
    return target.probe()


def _precision_fix(recipe: Recipe, name: str, precision: Precision) -> str:
    """Say which targets have a precision, and what this one could take."""
    able = [n for n, t in TARGETS.working().items() if precision in t.precisions]
    others = " ".join(f"--target {n}" for n in able)
    own = TARGETS.get(name).precisions[0].value
    return f"{others} for {precision.value}, or --precision {own}" if able else f"--precision {own}"
