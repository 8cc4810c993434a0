"""Side by side: the stock export of a baseline, ours, and the bound of the GEMMs alone.

All three come from the same weights and run interleaved in one process on the
same inputs. No ratio is computed unless ours gives the baseline's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flowexport.baseline.programs import lowered, published_program
from flowexport.baseline.sessions import BASELINE, LIMIT, OURS, Comparison, compare_sessions
from flowexport.baseline.steps import StepComparison, compare_steps, stream_program
from flowexport.baseline.stock import STOCK
from flowexport.bench import bench_feeds
from flowexport.core.errors import (
    InputError,
    UnavailableError,
    UnknownNameError,
)
from flowexport.core.types import Artifact, Options, Precision, TensorSpec
from flowexport.plan import override
from flowexport.process import convert_in_child, run_child
from flowexport.progress import SILENT, Progress
from flowexport.recipes import Recipe
from flowexport.registry import TARGETS
from flowexport.resolve import Subject, find_recipe, resolve

BASELINES = ("published",)


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
    stream: Path | None


def _programs(subject: Subject, root: Path, progress: Progress) -> _Programs:
    progress.stage("export the published form")
    published_program(subject, root / "published.pt2")
    progress.stage("lower")
    ours = lowered(subject, attention=True)
    ours.save(root / "ours.pt2")
    lowered(subject, attention=False).save(root / "limit.pt2")
    stream = None if subject.lengths is None else root / "stream.pt2"
    if stream is not None:
        stream_program(subject, stream)
    return _Programs(
        root / "published.pt2",
        root / "ours.pt2",
        root / "limit.pt2",
        tuple(s.static() for s in ours.inputs),
        tuple(s.static() for s in ours.outputs),
        stream,
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
        kind: peak_memory(kind, artifact, feeds, root, threads)["extra_bytes"]
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
    operators = {kind: operator_counts(target.inspect(a.path)) for kind, a in artifacts.items()}
    step: StepComparison | None = None
    if made.stream is not None:
        progress.stage(f"{name}: convert and measure the step")
        streaming = convert_in_child(
            target=name,
            model=model,
            program=made.stream,
            options=options,
            root=_folder(root / f"{name}-stream"),
            log=root / "logs" / f"{name}-stream.log",
            tick=tick,
        ).artifact
        step = compare_steps(
            subject.module,
            streaming,
            artifacts[BASELINE],
            feeds,
            threads=threads,
            max_rel=float(recipe.tolerance(name, Precision.FP32)["max_rel"]),
            warmup=warmup,
            rounds=rounds,
            min_seconds=min_seconds,
        )
    return replace(found, operators=operators, memory=memory, step=step)


def peak_memory(
    kind: str, artifact: Artifact, feeds: Mapping[str, np.ndarray], root: Path, threads: int
) -> dict[str, int | None]:
    """Return the extra bytes that a child needs for an artifact, None where unknown.

    Returns:
        ``extra_bytes`` to load and run it, ``run_extra_bytes`` to run it once it is loaded.
    """
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
    found: dict[str, int | None] = answer["result"]
    return found


def operator_counts(description: Mapping[str, Any]) -> dict[str, int]:
    """Return a file's operators by name, functions inlined, constants left out."""
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
