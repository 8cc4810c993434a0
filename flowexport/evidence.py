"""Evidence on a bundle's artifacts: gathering it, writing it down, reading it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.bundle import MANIFEST, REPORT_FILES, Bundle, file_table, output_errors, write_json
from flowexport.core.errors import BundleError, FlowExportError
from flowexport.core.hashing import sha256_file, sha256_tree
from flowexport.core.reports import LatencyReport, ParityReport, StepTimes, Tolerance
from flowexport.core.streaming import Stream
from flowexport.core.types import STEP, Artifact, Session
from flowexport.progress import Progress
from flowexport.recipes import hash_json
from flowexport.registry import TARGETS

if TYPE_CHECKING:
    from flowexport.parity import Bucket, Evaluation, Golden, SavedStream
    from flowexport.runners import Machine

NOT_VERIFIED = "verification was switched off (--no-verify)"


def skipped(
    name: str, manifest: Mapping[str, Any], reason: str, fix: str | None = None
) -> ParityReport:
    """Return a NOT_RUN with its reason for a target, converted or not."""
    entry = manifest["targets"].get(name, {})
    absent = {"max_rel": 0.0, "reason": "nothing was converted"}
    return ParityReport(
        target=name,
        artifact_sha256=None,
        manifest_sha256=entry.get("sha256"),
        tolerance=Tolerance.from_json(entry.get("tolerance", absent)),
        reference="none",
        required_fusions=entry.get("required_fusions", {}),
        not_run=reason.rstrip("."),
        fix=fix,
    )


def not_converted(manifest: Mapping[str, Any]) -> dict[str, ParityReport]:
    """Return a NOT_RUN for each target that could not be converted where the bundle was made."""
    return {
        name: skipped(name, manifest, f"not converted: {entry['reason']}", entry["fix"])
        for name, entry in manifest.get("not_run", {}).items()
    }


def references(root: Path, manifest: Mapping[str, Any]) -> tuple[Golden, Evaluation | None]:
    from flowexport import parity

    key = manifest["recipe_sha256"]
    golden = parity.read_golden(root / "golden", subject=key)
    folder = root / "evaluation"
    return golden, parity.read_evaluation(folder, subject=key) if folder.is_dir() else None


def saved_stream(root: Path, manifest: Mapping[str, Any]) -> SavedStream | None:
    """Return the reset state and the long stream of a causal model's bundle."""
    from flowexport import parity

    if manifest.get("streaming") is None:
        return None
    return parity.read_stream(root / "golden", subject=manifest["recipe_sha256"])


def saved_buckets(
    root: Path, manifest: Mapping[str, Any], evaluation: Evaluation | None
) -> tuple[Bucket, ...]:
    """Return what the shorter lengths of a bucketed model's bundle must give."""
    from flowexport import parity

    entry, key = manifest.get("buckets"), manifest["recipe_sha256"]
    return parity.read_buckets(root, entry["lengths"], evaluation, subject=key) if entry else ()


def verify_all(
    artifacts: Mapping[str, Artifact],
    manifest: Mapping[str, Any],
    root: Path,
    threads: int,
    progress: Progress,
    *,
    check_hash: bool = True,
    machine: Machine | None = None,
    samples: int | None = None,
) -> dict[str, ParityReport]:
    """Verify artifacts one by one.

    Args:
        machine: where the runtimes run; here where None.
        samples: as many of the evaluation set alone, and few steps of a stream.
        check_hash: False in this project's own test of damaged files alone; no command has it.
    """
    from flowexport import parity
    from flowexport.parity.identity import Identity

    check_manifest(root, manifest)
    golden, evaluation = references(root, manifest)
    stream = saved_stream(root, manifest)
    buckets = saved_buckets(root, manifest, evaluation)
    if samples is not None:
        evaluation, stream, buckets = parity.shorten(evaluation, stream, buckets, samples)
    reports = {}
    for name, artifact in artifacts.items():
        progress.stage(f"verify {name}")
        entry = manifest["targets"][name]
        try:
            target = TARGETS.get(name)
        except FlowExportError as error:
            reports[name] = skipped(name, manifest, error.message, error.fix)
            continue
        if machine is not None:
            from flowexport.runners import RunnerTarget

            target = RunnerTarget(target, machine)
            if (refusal := target.refusal(artifact)) is not None:
                reports[name] = skipped(name, manifest, refusal.message, refusal.fix)
                continue
        reports[name] = parity.verify_artifact(
            target,
            artifact,
            golden,
            evaluation,
            Tolerance.from_json(entry["tolerance"]),
            check_hash=check_hash,
            require_fusions=entry["required_fusions"],
            identity=Identity.of(artifact, manifest),
            stream=stream if artifact.functions else None,
            buckets=buckets,
            threads=threads,
            progress=lambda what, done, total: progress.step(done, total, what),
        )
        progress.note(f"{name}: {reports[name].verdict.value}")
    return reports


def bench_all(
    artifacts: Mapping[str, Artifact],
    manifest: Mapping[str, Any],
    root: Path,
    threads: int,
    progress: Progress,
) -> dict[str, LatencyReport]:
    """Load everything that runs here, and measure it interleaved."""
    from flowexport.bench import bench_feeds, measure

    golden, _ = references(root, manifest)
    progress.stage("bench")
    reports: dict[str, LatencyReport] = {}
    sessions: dict[str, Session] = {}
    settings = manifest["bench"]
    with ExitStack() as stack:
        for name, artifact in artifacts.items():
            if (changed := _changed(artifact)) is not None:
                reports[name] = LatencyReport(name, not_run=changed, fix="convert again")
                continue
            try:
                session = TARGETS.get(name).load(artifact, threads=threads)
                stack.enter_context(session)
                if session.info.execution == "native":
                    sessions[name] = session
                else:
                    reports[name] = LatencyReport(
                        name,
                        not_run=f"{session.info.label}: its time says nothing of a device.",
                        fix=TARGETS.get(name).probe().fix,
                    )
            except FlowExportError as error:
                reports[name] = LatencyReport(name, not_run=error.message, fix=error.fix)
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                reports[name] = LatencyReport(name, not_run=f"cannot be loaded: {lines[0][:300]}")
        if sessions:
            specs = artifacts[next(iter(sessions))].inputs
            reports |= measure(
                sessions,
                bench_feeds(specs, golden.cases[bench_case(golden)]),
                warmup=settings["warmup"],
                min_runs=settings["min_runs"],
                min_seconds=settings["min_seconds"],
                progress=lambda done, total: progress.step(done, total),
            )
    stream = saved_stream(root, manifest)
    for name in sessions:
        if stream is not None and artifacts[name].functions and reports[name].not_run is None:
            times = _bench_steps(artifacts[name], stream, settings, threads)
            reports[name] = replace(reports[name], steps=times)
    buckets = saved_buckets(root, manifest, None)
    for name in sessions:
        if buckets and reports[name].not_run is None:
            lengths = _bench_lengths(artifacts[name], buckets, settings, threads)
            reports[name] = replace(reports[name], lengths=lengths)
    return {name: reports[name] for name in artifacts}


def _changed(artifact: Artifact) -> str | None:
    """Say how a file is not the manifest's: a runtime may crash on bytes that nobody vouches for.

    ``verify`` runs no such file either.
    """
    wanted = {artifact.path: artifact.sha256}
    wanted |= {f.path: f.sha256 for f in artifact.functions.values()}
    for path, sha256 in wanted.items():
        if not path.exists():
            return f"{path.name} is missing from the bundle."
        if (found := sha256_tree(path)) != sha256:
            return f"the sha256 of {path.name} is {found[:12]}…; the manifest has {sha256[:12]}…."
    return None


def _bench_lengths(
    artifact: Artifact, buckets: Sequence[Bucket], settings: Mapping[str, Any], threads: int
) -> dict[str, tuple[float, ...]]:
    """Return the run times of each shorter length in milliseconds."""
    from flowexport.bench import bench_feeds, measure

    times = {}
    for bucket in buckets:
        function, golden = artifact.function(bucket.function), bucket.golden
        with TARGETS.get(artifact.target).load(function, threads=threads) as session:
            found = measure(
                {bucket.function: session},
                bench_feeds(function.inputs, golden.cases[bench_case(golden)]),
                warmup=settings["warmup"],
                min_runs=settings["min_runs"],
                min_seconds=settings["min_seconds"],
            )
        times[bucket.function] = found[bucket.function].samples_ms
    return times


def _bench_steps(
    artifact: Artifact, saved: SavedStream, settings: Mapping[str, Any], threads: int
) -> StepTimes:
    """Measure a step against the longest forward that the saved stream can feed."""
    from flowexport.bench import measure_steps

    lengths = {
        name: int(artifact.function(name).inputs[0].shape[1])
        for name in (artifact.entry, *artifact.functions)
        if name != STEP
    }
    most = saved.inputs.shape[1]
    name = max((n for n in lengths if lengths[n] <= most), key=lambda n: lengths[n])
    target = TARGETS.get(artifact.target)
    sequence = np.ascontiguousarray(saved.inputs[:, : lengths[name]])
    with (
        target.load(artifact.function(name), threads=threads) as forward,
        target.load(artifact.function(STEP), threads=threads) as session,
    ):
        return measure_steps(
            Stream(session, saved.max_steps),
            saved.reset,
            {saved.name: np.ascontiguousarray(saved.inputs[:, 0])},
            forward,
            {saved.name: sequence},
            warmup=settings["warmup"],
            min_runs=settings["min_runs"],
            min_seconds=settings["min_seconds"],
        )


def bench_case(golden: Golden) -> str:
    """Prefer a real sample, whose padding and range are those of use."""
    return next((c for c in golden.cases if c.startswith("sample-")), next(iter(golden.cases)))


def check_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Hold a manifest's parts against one another: an edited limit is no limit.

    Raises:
        BundleError: its recipe is not the one that its key names, or an artifact's
            tolerance is not the recipe's.
    """
    where = f"bundle {root}: {MANIFEST}"
    recipe = manifest["recipe"]
    fix = "convert again; a bundle is not edited by hand"
    if (key := hash_json(recipe)) != manifest["recipe_sha256"]:
        raise BundleError(
            f"{where} has a recipe of key {key[:12]}…; expected {manifest['recipe_sha256'][:12]}….",
            fix=fix,
        )
    for name, entry in manifest["targets"].items():
        limits = recipe["target_tolerances"].get(name)
        limits = limits or recipe["tolerances"].get(entry["precision"], {})
        for limit, value in limits.items():
            if limit != "max_accuracy_drop" and entry["tolerance"].get(limit) != value:
                raise BundleError(
                    f"{where}: {name} has {limit} {entry['tolerance'].get(limit)!r}; expected"
                    f" {value!r}, which its recipe has.",
                    fix=fix,
                )


def check_files(bundle: Bundle) -> None:
    """Hold the reference data against the manifest; artifacts are judged one by one.

    Raises:
        BundleError: a golden or evaluation file is missing or was changed.
    """
    for name, entry in bundle.manifest["files"].items():
        if name.split("/")[0] not in ("golden", "evaluation"):
            continue
        path = bundle.path / name
        actual = sha256_file(path) if path.is_file() else None
        if actual != entry["sha256"]:
            state = "is missing" if actual is None else f"has sha256 {actual[:12]}…"
            raise BundleError(
                f"bundle {bundle.path}: {name} {state}; expected {entry['sha256'][:12]}….",
                fix="convert again; a bundle is not edited by hand",
            )


def finish(
    root: Path,
    manifest: dict[str, Any],
    parity: Mapping[str, ParityReport],
    latency: Mapping[str, LatencyReport],
) -> None:
    """Write the report, then the manifest with the hash of every file."""
    from flowexport.report import validate, write_report

    write_report(root, manifest, parity, latency)
    mode = (root / "report.json").stat().st_mode  # as the user's umask has new files
    for path in root.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode)
    manifest["files"] = file_table(root)
    validate(manifest, "manifest")
    write_json(root / MANIFEST, manifest)


def record(
    bundle: Bundle,
    *,
    parity: Mapping[str, ParityReport] | None = None,
    latency: Mapping[str, LatencyReport] | None = None,
) -> None:
    """Write new findings into a bundle's report; those of other targets stay.

    Raises:
        OutputError: the bundle cannot be written.
    """
    from flowexport.report import read_report, write_report

    old_parity, old_latency = read_report(bundle.path)
    manifest = dict(bundle.manifest)
    with output_errors(bundle.path):
        write_report(
            bundle.path,
            manifest,
            {**old_parity, **(parity or {})},
            {**old_latency, **(latency or {})},
        )
        files = dict(manifest["files"])
        for name in REPORT_FILES:
            path = bundle.path / name
            files[name] = {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(bundle.path / MANIFEST, {**manifest, "files": files})
