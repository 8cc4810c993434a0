"""Side by side: the stock export of a baseline, ours, and the bound of the GEMMs alone.

All three come from the same weights and run interleaved in one process on the
same inputs. No ratio is computed unless ours gives the baseline's outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flowexport.baseline.programs import lowered, published_program
from flowexport.baseline.stock import STOCK
from flowexport.bench import Ratio, bench_feeds, measure, ratio_of_medians
from flowexport.core.errors import (
    InputError,
    UnavailableError,
    UnknownNameError,
    VerificationError,
)
from flowexport.core.reports import LatencyReport
from flowexport.core.types import Artifact, Options, Precision, Session, TensorSpec
from flowexport.plan import override
from flowexport.process import convert_in_child, run_child
from flowexport.progress import SILENT, Progress
from flowexport.recipes import Recipe
from flowexport.registry import TARGETS
from flowexport.resolve import Subject, find_recipe, resolve

BASELINES = ("published",)
BASELINE, OURS, LIMIT = "baseline", "ours", "limit"
MEMORY_METHOD = (
    "VmHWM of a child that loads the file and runs it 5 times, above its resident memory before"
)


@dataclass(frozen=True)
class Comparison:
    """Ours beside the baseline on one target.

    Attributes:
        ratio: baseline's median over ours; above 1 ours is faster.
        limit: baseline's median over that of the same model with its attentions
            reduced to their projections, through our conversion.
        latency: raw measurements of ``baseline``, ``ours`` and ``limit``.
        max_abs, max_rel: largest difference of ours from the baseline, absolute
            and over the baseline's largest output of that case.
        cases: inputs that the outputs were compared on.
        operators: of the three files, by name, functions inlined, constants left out.
        memory: extra bytes at the peak of loading and running, None where unknown.
        form: what lowering took.
        clock: ``thread_cpu`` (one thread) or ``wall``.
    """

    target: str
    ratio: Ratio
    limit: Ratio
    latency: Mapping[str, LatencyReport]
    max_abs: float
    max_rel: float
    cases: int
    operators: Mapping[str, Mapping[str, int]]
    memory: Mapping[str, int | None]
    form: str
    clock: str

    def p50(self, name: str) -> float:
        """Return the median latency in ms of ``baseline``, ``ours`` or ``limit``."""
        return float(np.median(self.latency[name].samples_ms))

    def to_json(self) -> dict[str, Any]:
        ours = self.latency[OURS]
        return {
            "ratio": self.ratio.to_json(),
            "limit_ratio": self.limit.median,
            "limit": self.limit.to_json(),
            "baseline_ms_p50": self.p50(BASELINE),
            "latency_ms_p50": self.p50(OURS),
            "limit_ms_p50": self.p50(LIMIT),
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "compared_cases": self.cases,
            "operators": {
                name: {"total": sum(counts.values()), "by_name": dict(counts)}
                for name, counts in self.operators.items()
            },
            "peak_memory": {
                **{f"{name}_extra_bytes": value for name, value in self.memory.items()},
                "method": MEMORY_METHOD,
            },
            "form": self.form,
            "clock": self.clock,
            "threads": ours.threads,
            "runtime": ours.runtime,
            "machine": ours.machine,
            "load_before": ours.load_before,
            "load_after": ours.load_after,
        }


def compare_recipe(
    source: str | Path | Recipe,
    *,
    baseline: str = "published",
    targets: Sequence[str] = (),
    threads: int | None = None,
    rounds: int | None = None,
    min_seconds: float | None = None,
    weights: str | Path | None = None,
    inputs: Sequence[TensorSpec] = (),
    progress: Progress = SILENT,
) -> dict[str, Comparison]:
    """Export a model both ways in float32, compare the outputs, measure interleaved.

    Args:
        source: a recipe, a model's name or ``file.py:factory``; not a bundle,
            which holds no module.
        baseline: ``published``.
        targets: those with a stock exporter; the recipe's that have one where empty.
        threads, rounds, min_seconds: of each session; the recipe's where None.

    Returns:
        One comparison a target.

    Raises:
        UnknownNameError, InputError: no such baseline, target or model.
        UnavailableError: the target cannot be converted or run here.
        ConversionError, LoweringError: an exporter refused the model.
        VerificationError: ours does not give the baseline's outputs.
    """
    if baseline not in BASELINES:
        raise UnknownNameError("baseline", baseline, BASELINES)
    for name in targets:
        if name not in TARGETS.names():
            raise UnknownNameError("target", name, TARGETS.names())
        if name not in STOCK:
            raise InputError(
                f"bench {name}: the target has no stock exporter to compare with;"
                f" expected one of: {', '.join(STOCK)}."
            )
    if _is_bundle(source):
        raise InputError(
            f"bench {source}: a bundle holds no module that the published form could be exported"
            " from; expected a recipe or model.",
            fix="name the recipe that the bundle was made from",
        )
    recipe = override(find_recipe(source), Precision.FP32, weights, inputs)
    chosen = [t for t in (targets or recipe.targets or STOCK) if t in STOCK]
    if not chosen:
        raise InputError(
            f"bench {recipe.name}: none of the recipe's targets has a stock exporter;"
            f" expected one of: {', '.join(STOCK)}.",
            fix="--target onnx",
        )
    for name in chosen:
        _require(name, recipe.name)
    progress.stage("resolve")
    subject = resolve(recipe)
    settings = recipe.bench
    with TemporaryDirectory(prefix="flowexport-bench-") as folder:
        root = Path(folder)
        made = _programs(subject, root, progress)
        return {
            name: _compare_target(
                name,
                subject,
                made,
                root,
                threads=threads or settings.threads,
                warmup=settings.warmup,
                rounds=rounds or settings.min_runs,
                min_seconds=settings.min_seconds if min_seconds is None else min_seconds,
                progress=progress,
            )
            for name in chosen
        }


@dataclass(frozen=True)
class _Programs:
    published: Path
    ours: Path
    limit: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def _programs(subject: Subject, root: Path, progress: Progress) -> _Programs:
    progress.stage("export the published form")
    published_program(subject, root / "published.pt2")
    progress.stage("lower")
    ours = lowered(subject, attention=True)
    ours.save(root / "ours.pt2")
    lowered(subject, attention=False).save(root / "limit.pt2")
    return _Programs(
        root / "published.pt2",
        root / "ours.pt2",
        root / "limit.pt2",
        tuple(s.static() for s in ours.inputs),
        tuple(s.static() for s in ours.outputs),
    )


def _compare_target(
    name: str,
    subject: Subject,
    made: _Programs,
    root: Path,
    *,
    threads: int,
    warmup: int,
    rounds: int,
    min_seconds: float,
    progress: Progress,
) -> Comparison:
    from flowexport.parity import make_cases

    recipe, model = subject.recipe, subject.spec.name
    options = replace(recipe.options(name), precision=Precision.FP32)
    tick = lambda seconds: progress.step(seconds, None)  # noqa: E731
    progress.stage(f"{name}: stock export")
    target = TARGETS.get(name)
    answer = run_child(
        "flowexport.baseline.worker",
        {
            "task": "stock",
            "target": name,
            "program": str(made.published),
            "model": model,
            "inputs": [s.to_json() for s in made.inputs],
            "outputs": [s.to_json() for s in made.outputs],
            "path": str(root / f"{name}-stock" / f"{model}{target.suffix}"),
            "root": str(root),
        },
        request_file=root / f"{name}-stock.request.json",
        where=f"bench {name} {model}",
        what="the stock exporter",
        root=root,
        log=root / "logs" / f"{name}-stock.log",
        tick=tick,
    )
    artifacts = {BASELINE: Artifact.from_json(answer["result"], root)}
    for kind, program, extra in (
        (OURS, made.ours, options),
        # No attention is left that a form could be pinned for.
        (LIMIT, made.limit, Options(extra={k: v for k, v in options.extra.items() if k != "form"})),
    ):
        progress.stage(f"{name}: convert {kind}")
        artifacts[kind] = convert_in_child(
            target=name,
            model=model,
            program=program,
            options=extra,
            root=_folder(root / f"{name}-{kind}"),
            log=root / "logs" / f"{name}-{kind}.log",
            tick=tick,
        ).artifact
    cases = {
        case: feeds
        for case, feeds in make_cases(
            subject.spec.inputs, subject.dataset, seed=recipe.seed
        ).items()
        if all(len(v) == 1 for v in feeds.values())
    }
    case = next((c for c in cases if c.startswith("sample-")), next(iter(cases)))
    feeds = bench_feeds(made.inputs, cases[case])
    progress.stage(f"{name}: peak memory")
    memory = {
        kind: _peak_memory(kind, artifact, feeds, root, threads)
        for kind, artifact in artifacts.items()
    }
    progress.stage(f"{name}: measure")
    with ExitStack() as stack:
        sessions = {
            kind: stack.enter_context(target.load(artifact, threads=threads))
            for kind, artifact in artifacts.items()
        }
        found = compare_sessions(
            sessions,
            list(cases.values()),
            feeds,
            max_rel=float(recipe.tolerance(name, Precision.FP32)["max_rel"]),
            warmup=warmup,
            rounds=rounds,
            min_seconds=min_seconds,
            progress=lambda done, total: progress.step(done, total),
        )
    operators = {kind: _operators(target.inspect(a.path)) for kind, a in artifacts.items()}
    return replace(found, operators=operators, memory=memory)


def compare_sessions(
    sessions: Mapping[str, Session],
    cases: Sequence[Mapping[str, np.ndarray]],
    feeds: Mapping[str, np.ndarray],
    *,
    max_rel: float,
    warmup: int = 3,
    rounds: int = 50,
    min_seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the outputs of ``ours`` with ``baseline``'s, then measure all interleaved.

    One thread is measured by the CPU time of the calling thread, on which
    both runtimes then work: other load of the machine is not counted. More
    threads are measured by wall time.

    Args:
        sessions: ``baseline``, ``ours`` and ``limit``.
        cases: inputs to compare the outputs on.
        feeds: inputs to measure with.
        max_rel: largest difference over the baseline's largest output of a case.

    Raises:
        VerificationError: the outputs disagree, or a session cannot run.
    """
    where = f"bench {sessions[OURS].artifact.target} {sessions[OURS].artifact.model}"
    max_abs, worst = _difference(sessions[BASELINE], sessions[OURS], cases, max_rel, where)
    threads = sessions[OURS].info.threads
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    reports = measure(
        sessions,
        feeds,
        warmup=warmup,
        min_runs=rounds,
        min_seconds=min_seconds,
        progress=progress,
        clock=clock,
    )
    for kind, report in reports.items():
        if report.not_run is not None:
            raise VerificationError(f"{where}: {kind} cannot be measured: {report.not_run}.")
    times = {kind: report.samples_ms for kind, report in reports.items()}
    artifact = sessions[OURS].artifact
    return Comparison(
        target=artifact.target,
        ratio=ratio_of_medians(times[BASELINE], times[OURS]),
        limit=ratio_of_medians(times[BASELINE], times[LIMIT]),
        latency=reports,
        max_abs=max_abs,
        max_rel=worst,
        cases=len(cases),
        operators={},
        memory={},
        form=artifact.form,
        clock="thread_cpu" if threads == 1 else "wall",
    )


def _difference(
    baseline: Session,
    ours: Session,
    cases: Sequence[Mapping[str, np.ndarray]],
    max_rel: float,
    where: str,
) -> tuple[float, float]:
    from flowexport.parity import compare

    max_abs = worst = 0.0
    for feeds in cases:
        wanted, got = baseline.run(feeds), ours.run(feeds)
        for name, value in wanted.items():
            found = compare("", name, got[name], value.astype(np.float64), dtype=value.dtype.name)
            if found.problem is not None:
                raise VerificationError(f"{where}: {name} {found.problem}; no ratio is given.")
            assert found.max_abs is not None and found.max_rel is not None
            max_abs, worst = max(max_abs, found.max_abs), max(worst, found.max_rel)
    if not worst <= max_rel:
        raise VerificationError(
            f"{where}: ours differs from the baseline by {worst:.1e} of its largest output;"
            f" expected at most {max_rel:.1e}, so no ratio is given.",
            fix="`flowexport convert` with verification tells which output is wrong",
        )
    return max_abs, worst


def _peak_memory(
    kind: str, artifact: Artifact, feeds: Mapping[str, np.ndarray], root: Path, threads: int
) -> int | None:
    np.savez(root / "feeds.npz", **feeds)  # type: ignore[arg-type]
    answer = run_child(
        "flowexport.baseline.worker",
        {
            "task": "memory",
            "artifact": artifact.to_json(root),
            "feeds": str(root / "feeds.npz"),
            "threads": threads,
            "root": str(root),
        },
        request_file=root / f"{artifact.target}-{kind}-memory.request.json",
        where=f"bench {artifact.target} {artifact.model}",
        what=f"running {kind}",
        root=root,
        log=root / "logs" / f"{artifact.target}-{kind}-memory.log",
    )
    extra: int | None = answer["result"]["extra_bytes"]
    return extra


def _operators(description: Mapping[str, Any]) -> dict[str, int]:
    counts = dict(description.get("operators_inlined") or description["operators"])
    counts.pop("Constant", None)  # a weight by another name, not an operation
    return counts


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def _is_bundle(source: str | Path | Recipe) -> bool:
    return not isinstance(source, Recipe) and (Path(source) / "manifest.json").is_file()


def _require(name: str, model: str) -> None:
    found = TARGETS.get(name).probe()
    if not (found.converts and found.runs):
        raise UnavailableError(
            f"bench {name} {model}: the target is not available:"
            f" {(found.reason or 'no reason given').rstrip('.')}.",
            fix=found.fix,
        )
