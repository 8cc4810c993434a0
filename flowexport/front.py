"""The front of accuracy, latency and size over precisions and targets.

Each precision becomes a bundle of its own, verified as any other; then every
artifact that runs here is measured in the same rounds, so that their times can
be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flowexport.bundle import Bundle, output_errors, write_json
from flowexport.core.errors import FlowExportError, InputError, UnknownNameError
from flowexport.core.reports import LatencyReport, ParityReport
from flowexport.core.types import Precision, Session, Verdict
from flowexport.evidence import bench_case, references
from flowexport.pipeline import Result, run_plan
from flowexport.plan import Plan, make_plan
from flowexport.progress import SILENT, Progress
from flowexport.recipes import Recipe
from flowexport.registry import TARGETS
from flowexport.resolve import find_recipe

SCHEMA = "flowexport.front/1"
FILES = ("front.json", "front.html")
NOISE = 1.03
"""Medians of the same file in the same rounds differ by up to 3 %."""


@dataclass(frozen=True)
class Point:
    """One artifact among the others.

    Attributes:
        accuracy, reference_accuracy: shares (0..1) of the evaluation set, or None.
        p_value: exact McNemar test against the reference.
        sqnr_db: the worst case's, over every comparison.
        latency_ms: median of the interleaved runs, or None with ``not_measured``.
        on_front: no other point is at least as good in accuracy, latency and size,
            and better in one.
        remark: what is to be said of this choice, or None.
    """

    target: str
    precision: str
    bundle: str
    size_bytes: int
    verdict: str
    reason: str | None
    accuracy: float | None
    reference_accuracy: float | None
    agreement: int | None
    samples: int | None
    p_value: float | None
    sqnr_db: float | None
    execution: str | None
    latency_ms: float | None
    not_measured: str | None
    on_front: bool = False
    remark: str | None = None

    @property
    def name(self) -> str:
        return f"{self.target} {self.precision}"


@dataclass(frozen=True)
class Front:
    """All points, and the folder with the bundles, ``front.json`` and ``front.html``."""

    out: Path
    recipe: str
    points: tuple[Point, ...]
    conditions: Mapping[str, Any]

    @property
    def failed(self) -> list[Point]:
        return [p for p in self.points if p.verdict == Verdict.FAIL.value]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "conditions": dict(self.conditions),
            "points": [asdict(p) for p in self.points],
        }


def front(
    source: str | Path | Recipe,
    *,
    precisions: Sequence[str] = (),
    targets: Sequence[str] = (),
    out: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
    **plan: Any,
) -> Front:
    """Convert a model in several precisions, and compare what they cost and lose.

    Args:
        precisions: by name; all of them where empty.
        targets: only these; the recipe's where empty. Each takes part in the
            precisions that it has.
        out: folder for one bundle a precision and the report, ``out/<recipe>-front`` where None.
        plan: more arguments of :func:`flowexport.plan.make_plan` (weights, calibration, ...).

    Raises:
        FlowExportError: as :func:`flowexport.convert`; every plan is made before anything is
            converted.
    """
    for name in precisions:
        if name not in list(Precision):
            raise UnknownNameError("precision", name, [p.value for p in Precision])
    for name in targets:
        if name not in TARGETS.names():
            raise UnknownNameError("target", name, TARGETS.names())
    recipe = find_recipe(source)
    names = list(targets or recipe.targets or TARGETS.names())
    folder = (Path(out) if out is not None else Path("out") / f"{recipe.name}-front").absolute()
    plans: dict[str, Plan] = {}
    progress.stage("resolve")
    for precision in dict.fromkeys(Precision(p) for p in precisions or list(Precision)):
        able = [n for n in names if precision in TARGETS.get(n).precisions]
        if not able:
            if precisions:
                raise InputError(
                    f"front {recipe.name}: none of {', '.join(names)} has {precision.value};"
                    " expected a precision that one of them has.",
                    fix="--target with one that has it",
                )
            continue
        named = replace(recipe, targets={n: recipe.options(n) for n in able})
        place = folder / precision.value
        plans[precision.value] = make_plan(
            named, precision=precision, out=place, force=force, threads=threads, **plan
        )
    results = {
        precision: run_plan(one, force=force, bench=False, progress=progress)
        for precision, one in plans.items()
    }
    latency = _measure_together(results, next(iter(plans.values())), progress)
    points = _remarks(_points(results, latency))
    found = Front(folder, recipe.name, tuple(points), _conditions(latency))
    from flowexport.report.front import render_front

    with output_errors(folder):
        write_json(folder / FILES[0], found.to_json())
        (folder / FILES[1]).write_text(render_front(found.to_json()), encoding="utf-8")
    return found


def _measure_together(
    results: Mapping[str, Result], plan: Plan, progress: Progress
) -> dict[tuple[str, str], LatencyReport]:
    """Measure every artifact that runs natively here, in the same rounds."""
    from flowexport.bench import bench_feeds, measure

    reports: dict[tuple[str, str], LatencyReport] = {}
    sessions: dict[str, Session] = {}
    keys: dict[str, tuple[str, str]] = {}
    feeds: dict[str, Any] = {}
    progress.stage("bench")
    with ExitStack() as stack:
        for precision, result in results.items():
            for name, artifact in Bundle.open(result.bundle).artifacts().items():
                key = (name, precision)
                try:
                    session = TARGETS.get(name).load(artifact, threads=plan.threads)
                    stack.enter_context(session)
                except FlowExportError as error:
                    reports[key] = LatencyReport(name, not_run=error.message, fix=error.fix)
                    continue
                if session.info.execution != "native":
                    text = f"{session.info.label}: its time says nothing of a device"
                    reports[key] = LatencyReport(name, not_run=text)
                    continue
                label = f"{name} {precision}"
                sessions[label], keys[label] = session, key
                if not feeds:
                    golden, _ = references(result.bundle, result.manifest)
                    case = golden.cases[bench_case(golden)]
                    feeds = bench_feeds(artifact.inputs, case)
        if sessions:
            bench = plan.recipe.bench
            measured = measure(
                sessions,
                feeds,
                warmup=bench.warmup,
                min_runs=bench.min_runs,
                min_seconds=bench.min_seconds,
                progress=lambda done, total: progress.step(done, total),
            )
            reports |= {keys[label]: report for label, report in measured.items()}
    return reports


def _points(
    results: Mapping[str, Result], latency: Mapping[tuple[str, str], LatencyReport]
) -> list[Point]:
    points = []
    for precision, result in results.items():
        for name, entry in result.manifest["targets"].items():
            parity: ParityReport = result.parity[name]
            accuracy, times = parity.accuracy, latency[name, precision]
            points.append(
                Point(
                    target=name,
                    precision=precision,
                    bundle=precision,
                    size_bytes=entry["size_bytes"],
                    verdict=parity.verdict.value,
                    reason=parity.reason,
                    accuracy=None if accuracy is None else accuracy.accuracy,
                    reference_accuracy=None if accuracy is None else accuracy.reference_accuracy,
                    agreement=None if accuracy is None else accuracy.agreement,
                    samples=None if accuracy is None else accuracy.samples,
                    p_value=None if accuracy is None else accuracy.p_value,
                    sqnr_db=parity.sqnr_db,
                    execution=parity.execution,
                    latency_ms=times.p50,
                    not_measured=times.not_run,
                )
            )
    return points


def _remarks(points: Sequence[Point]) -> list[Point]:
    """Mark the front, and say which choices gain nothing beside fp16 of the same target."""
    told = []
    for p in points:
        ahead = any(_beats(other, p) for other in points)
        measured = p.verdict == Verdict.PASS.value and p.latency_ms is not None
        remark = None
        half = next((h for h in points if h.target == p.target and h.precision == "fp16"), None)
        if half is not None and Precision(p.precision).quantised:
            slower = _slower(p.latency_ms, half.latency_ms)
            worse = _less_accurate(p, half)
            if slower and worse:
                share = p.size_bytes / half.size_bytes
                remark = (
                    f"slower ({p.latency_ms:.3g} against {half.latency_ms:.3g} ms) and less"
                    f" accurate than fp16 on {p.target}: {worse}; all it gains is size"
                    f" ({share:.2f}x)"
                )
        told.append(replace(p, on_front=measured and not ahead, remark=remark))
    return told


def _less_accurate(p: Point, half: Point) -> str | None:
    """Say by what a point is less accurate: on the set, or, where that is even, in SQNR."""
    if p.accuracy is not None and half.accuracy is not None and p.accuracy != half.accuracy:
        if p.accuracy < half.accuracy:
            return f"{100 * p.accuracy:.2f} against {100 * half.accuracy:.2f} %"
        return None
    if p.sqnr_db is not None and half.sqnr_db is not None and p.sqnr_db < half.sqnr_db:
        return f"{p.sqnr_db:.0f} against {half.sqnr_db:.0f} dB"
    return None


def _beats(a: Point, b: Point) -> bool:
    """Whether ``a`` is at least as good as ``b`` in everything and better in something."""
    if a is b or a.verdict != "PASS" or a.latency_ms is None or b.latency_ms is None:
        return False
    pairs = [
        (a.latency_ms, b.latency_ms),
        (a.size_bytes, b.size_bytes),
        (-(a.accuracy or 0.0), -(b.accuracy or 0.0)),
    ]
    if a.accuracy is None:
        pairs[2] = (-(a.sqnr_db or 0.0), -(b.sqnr_db or 0.0))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def _slower(a: float | None, b: float | None) -> bool:
    """Whether ``a`` ms are more than ``b`` ms by more than medians of one run differ by."""
    return a is not None and b is not None and a > NOISE * b


def _conditions(latency: Mapping[tuple[str, str], LatencyReport]) -> dict[str, Any]:
    timed = next((r for r in latency.values() if r.samples_ms), None)
    if timed is None:
        return {}
    return {
        "machine": dict(timed.machine),
        "threads": timed.threads,
        "iterations": timed.iterations,
        "load_before": timed.load_before,
        "load_after": timed.load_after,
    }
