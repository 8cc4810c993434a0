"""The way, written once: lower, convert, verify, bench, report; and the same on a bundle.

>>> import flowexport
>>> result = flowexport.convert("japanese-vowels", out="out/jv")
>>> result.verdict, result.parity["onnx"].max_abs
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowexport.bundle import Bundle, Staging, output_errors
from flowexport.calibration import write_samples
from flowexport.core.errors import BundleError, ConversionError, InputError, UnknownNameError
from flowexport.core.reports import LatencyReport, ParityReport, verdict_of
from flowexport.core.steps import last_step
from flowexport.core.types import Precision, TensorSpec, Verdict, float_precision
from flowexport.evidence import (
    NOT_VERIFIED,
    bench_all,
    check_files,
    finish,
    not_converted,
    record,
    skipped,
    verify_all,
)
from flowexport.manifest import make_manifest
from flowexport.ops.installed import installed_ops
from flowexport.plan import Plan, check_points, make_plan
from flowexport.process import Conversion, convert_in_child
from flowexport.progress import SILENT, Progress
from flowexport.recipes import Recipe
from flowexport.references import probes, write_references
from flowexport.registry import TARGETS

if TYPE_CHECKING:
    from flowexport.lowering import LoweredProgram


@dataclass(frozen=True)
class Result:
    """What a conversion, a verification or a measurement of a bundle gave.

    Attributes:
        bundle: the folder.
        required: targets for which NOT_RUN is a failure.
    """

    bundle: Path
    manifest: Mapping[str, Any]
    parity: Mapping[str, ParityReport] = field(default_factory=dict)
    latency: Mapping[str, LatencyReport] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.parity, self.required)

    @property
    def failed(self) -> list[str]:
        """Targets whose artifact is not what it must be."""
        return [n for n, r in self.parity.items() if r.verdict is Verdict.FAIL]

    @property
    def missing(self) -> list[str]:
        """Required targets that did not run."""
        return [
            n
            for n in self.required
            if n not in self.parity or self.parity[n].verdict is Verdict.NOT_RUN
        ]


def convert(
    source: str | Path | Recipe,
    *,
    targets: Sequence[str] = (),
    precision: str | Precision | None = None,
    weights: str | Path | None = None,
    inputs: Sequence[TensorSpec] = (),
    out: str | Path | None = None,
    force: bool = False,
    verify: bool = True,
    bench: bool = True,
    check: bool = True,
    plugin: bool = True,
    calibration: str | Path | None = None,
    max_accuracy_drop: float | None = None,
    require: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Convert a model to every target of its recipe, verify, measure and report.

    Args:
        source: a recipe's name or path, a model's name, ``path/to/file.py:factory``, or a Recipe.
        targets: only these; one that is not available here is an error.
        precision: :class:`~flowexport.core.types.Precision` for every target, instead of the
            recipe's.
        weights: checkpoint, instead of the recipe's.
        inputs: shapes, instead of the recipe's; a factory needs them.
        out: the bundle's folder, ``out/<recipe>`` where None.
        force: replace an older bundle there.
        check: refuse fp16 where no form of an attention survives it.
        calibration: samples for int8-static: a data set's name or a ``.npz`` file.
        max_accuracy_drop: points (0..100) of accuracy that may be lost on the evaluation set.
        plugin: False builds attentions from the runtime's own layers where a target has a plugin.
        require: targets that must convert, and run, here.
        threads: of the runtimes that are verified and measured.

    Returns:
        The bundle's place and all evidence. A failed verification is a FAIL in
        it, not an exception, and the bundle is there.

    Raises:
        FlowExportError: see :mod:`flowexport.core.errors`; there is no bundle then.
    """
    progress.stage("resolve")
    plan = make_plan(
        source,
        targets=targets,
        precision=precision,
        weights=weights,
        inputs=inputs,
        out=out,
        force=force,
        threads=threads,
        require=require,
        check=check,
        plugin=plugin,
        calibration=calibration,
        max_accuracy_drop=max_accuracy_drop,
    )
    return run_plan(
        plan, force=force, verify=verify, bench=bench, require=require, progress=progress
    )


def run_plan(
    plan: Plan,
    *,
    force: bool = False,
    verify: bool = True,
    bench: bool = True,
    require: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Result:
    """Do what a plan says; see :func:`convert`."""
    with Staging(plan.out, force=force) as staging, output_errors(staging.out):
        root = staging.path
        work = root / ".work"
        work.mkdir()
        programs = _lower(plan, work, progress)
        write_references(plan, root, progress)
        try:
            conversions = _convert_all(plan, programs, root, work, progress)
        except ConversionError as error:
            raise _with_log(error, staging) from error
        first = next(iter(programs.values()))
        shutil.rmtree(work)
        manifest = make_manifest(plan, conversions, first.outputs, len(first.attentions), root)
        artifacts = {name: c.artifact for name, c in conversions.items()}
        parity = not_converted(manifest)
        if verify:
            parity |= verify_all(artifacts, manifest, root, plan.threads, progress)
        else:
            parity |= {n: skipped(n, manifest, NOT_VERIFIED) for n in artifacts}
        latency: dict[str, LatencyReport] = {}
        if bench:
            latency = bench_all(artifacts, manifest, root, plan.threads, progress)
        progress.stage("report")
        finish(root, manifest, parity, latency)
        place = staging.commit()
    return Result(place, manifest, parity, latency, tuple(require))


def verify(
    bundle: str | Path,
    *,
    targets: Sequence[str] = (),
    require: Sequence[str] = (),
    threads: int | None = None,
    max_accuracy_drop: float | None = None,
    save: bool = False,
    runner: str | None = None,
    samples: int | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Check every artifact of a bundle against its hash, golden outputs and evaluation set.

    Args:
        max_accuracy_drop: points (0..100) of accuracy that may be lost, instead of the bundle's
            own limits.
        save: also write the findings into the bundle's report.
        runner: where the runtimes run instead of here, one of ``flowexport.runners.RUNNERS``;
            it is set up first.
        samples: as many of the evaluation set alone; an emulator gets 32 where None.

    Raises:
        BundleError: the path is no bundle, or its reference data is damaged.
        InputError: ``save`` with a runner, whose findings are not this machine's.
        UnavailableError: the runner cannot be had here.
    """
    if save and (runner is not None or samples is not None):
        raise InputError(
            f"verify: --save with {'--runner' if runner else '--samples'} would replace this"
            " machine's whole findings; expected one of the two.",
            fix="leave --save out, and keep the output of --json",
        )
    opened = Bundle.open(Path(bundle))
    manifest = opened.manifest
    absent = not_converted(manifest)
    for name in (*targets, *require):
        if name not in {*manifest["targets"], *absent}:
            known = [*manifest["targets"], *absent]
            raise UnknownNameError("target", name, known, where=f"bundle {opened.path}")
    # --require adds to what --target selects.
    chosen = {*targets, *require} if targets else {*manifest["targets"], *absent}
    artifacts = {n: a for n, a in opened.artifacts().items() if n in chosen}
    if max_accuracy_drop is not None:
        manifest = _limit_drop(opened, max_accuracy_drop)
    check_files(opened)
    count = _threads(threads, manifest)
    machine = None
    if runner is not None:
        from flowexport.runners import EMULATED_SAMPLES, prepare

        progress.stage(f"set up {runner}")
        machine = prepare(runner, lambda what: progress.step(0, None, what))
        if machine.execution == "emulated" and samples is None:
            samples = EMULATED_SAMPLES
    parity = verify_all(
        artifacts, manifest, opened.path, count, progress, machine=machine, samples=samples
    )
    parity |= {n: r for n, r in absent.items() if n in chosen}
    result = Result(opened.path, manifest, parity, {}, tuple(require))
    if save:
        record(opened, parity=parity)
    return result


def _limit_drop(opened: Bundle, points: float) -> dict[str, Any]:
    """Return the bundle's manifest with another limit on the accuracy, of every target.

    Raises:
        BundleError: the bundle has no evaluation set.
        InputError: the limit is no number of points.
    """
    check_points(points)
    if not (opened.path / "evaluation").is_dir():
        raise BundleError(
            f"bundle {opened.path}: has no evaluation set; expected one, on which"
            f" --max-accuracy-drop {points:g} is judged.",
            fix="convert again with `evaluation: {dataset: NAME}` in the recipe",
        )
    manifest = copy.deepcopy(dict(opened.manifest))
    for entry in manifest["targets"].values():
        entry["tolerance"] = {**entry["tolerance"], "max_accuracy_drop": points}
    return manifest


def benchmark(
    bundle: str | Path,
    *,
    targets: Sequence[str] = (),
    threads: int | None = None,
    save: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Measure the latency of a bundle's artifacts, all of them interleaved.

    Args:
        threads: of each runtime; the recipe's where None.
        save: also write the measurements into the bundle's report.
    """
    opened = Bundle.open(Path(bundle))
    artifacts = opened.select(tuple(targets))
    check_files(opened)
    latency = bench_all(
        artifacts, opened.manifest, opened.path, _threads(threads, opened.manifest), progress
    )
    if save:
        record(opened, latency=latency)
    return Result(opened.path, opened.manifest, {}, latency)


def report(bundle: str | Path) -> Path:
    """Write a bundle's ``report.html`` anew from its ``report.json``; return its path."""
    opened = Bundle.open(Path(bundle))
    record(opened)
    return opened.path / "report.html"


def _lower(plan: Plan, work: Path, progress: Progress) -> dict[Precision, LoweredProgram]:
    """Lower once for each precision that a target asks for."""
    from flowexport.lowering import lower, lower_buckets, lower_streaming

    subject, spec = plan.subject, plan.subject.spec
    programs = {}
    wanted = list(
        dict.fromkeys(float_precision(TARGETS.get(n), o.precision) for n, o in plan.options.items())
    )
    progress.stage("lower")
    for done, precision in enumerate(wanted):
        progress.step(done, len(wanted), precision.value)
        arguments: dict[str, Any] = {
            "name": spec.name,
            "ops": installed_ops(),
            "precision": precision,
            "labels": spec.labels,
            "preprocessing": spec.preprocessing,
            "recipe_sha256": subject.recipe_sha256,
        }
        module = copy.deepcopy(subject.module)
        if subject.lengths is not None:
            program = lower_streaming(
                module, spec.inputs, spec.output_names, lengths=subject.lengths, **arguments
            )
        elif subject.buckets is not None:
            program = lower_buckets(module, subject.buckets, spec.output_names, **arguments)
        else:
            program = lower(module, spec.inputs, spec.output_names, **arguments)
        program.save(work / f"program-{precision.value}.pt2")
        programs[precision] = program
    return programs


def _convert_all(
    plan: Plan,
    programs: Mapping[Precision, LoweredProgram],
    root: Path,
    work: Path,
    progress: Progress,
) -> dict[str, Conversion]:
    conversions = {}
    samples = None
    if plan.subject.calibration is not None:
        samples = work / "calibration.safetensors"
        write_samples(plan.subject.calibration, samples, probes(plan, root))
    for name, options in plan.options.items():
        progress.stage(f"convert {name} {options.precision.value}")
        computed = float_precision(TARGETS.get(name), options.precision)
        conversions[name] = convert_in_child(
            target=name,
            model=programs[computed].model,
            program=work / f"program-{computed.value}.pt2",
            options=replace(options, calibration=samples),
            root=root,
            log=(log := root / "logs" / f"{name}.log"),
            tick=lambda seconds, log=log: progress.step(seconds, None, last_step(log)),  # type: ignore[misc]
        )
    return conversions


def _with_log(error: ConversionError, staging: Staging) -> ConversionError:
    """Keep the failed target's log beside the output folder and say where."""
    logs = sorted((staging.path / "logs").glob("*.log"), key=lambda p: p.stat().st_mtime_ns)
    kept = staging.keep_log(logs[-1]) if logs else None
    if kept is None:
        return error
    raised = type(error)(error.message, fix=error.fix)
    raised.add_note(f"The whole log: {kept}")
    return raised


def _threads(threads: int | None, manifest: Mapping[str, Any]) -> int:
    count = int(manifest["bench"]["threads"]) if threads is None else threads
    if count < 1:
        raise InputError(f"threads: has {count}; expected 1 or more.")
    return count
