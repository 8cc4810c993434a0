"""A bundle's own report as rows of the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowexport.bundle import Bundle
from flowexport.core.errors import VerificationError
from flowexport.core.reports import EVALUATION_PREFIX, LatencyReport, ParityReport
from flowexport.core.types import Artifact, Verdict
from flowexport.devices.references import Key, Reference
from flowexport.devices.rows import Accuracy, Agreement, InputCheck, Row
from flowexport.devices.timing import Timing
from flowexport.package.build import model_id
from flowexport.report import read_report


def judge_bundle(path: Path, references: Mapping[Key, Reference]) -> list[Row]:
    """Return a row for each target that a bundle's report has evidence on.

    Verdicts follow from the report's raw findings, as everywhere; outputs are
    not run again (`flowexport verify BUNDLE --save` does that).

    Raises:
        BundleError: no bundle, or a report that cannot be used.
        VerificationError: the report is on another file than the references'.
    """
    bundle = Bundle.open(path)
    parity, latency = read_report(bundle.path)
    created = json.loads((bundle.path / "report.json").read_text(encoding="utf-8"))["generated"]
    name = model_id(bundle.manifest)
    machine: Mapping[str, Any] = next((r.machine for r in latency.values() if r.machine), {})
    rows = []
    for target, artifact in bundle.artifacts().items():
        found, times = parity.get(target), latency.get(target)
        reference = references.get((name, target))
        for sha256 in (artifact.sha256, found and found.artifact_sha256):
            if reference is not None and sha256 not in (None, reference.sha256):
                raise VerificationError(
                    f"merge {path}: {name} {target} has sha256 {str(sha256)[:12]}…;"
                    f" expected {reference.sha256[:12]}… as {reference.origin} has.",
                    fix="merge the reports of one conversion at a time",
                )
        rows.append(_row(bundle, name, artifact, found, times, machine, created))
    return rows


def _row(
    bundle: Bundle,
    name: str,
    artifact: Artifact,
    parity: ParityReport | None,
    latency: LatencyReport | None,
    machine: Mapping[str, Any],
    created: str,
) -> Row:
    runtime = (parity and parity.runtime) or (latency and latency.runtime) or {}
    device = machine.get("cpu") or bundle.manifest["machine"]["platform"]
    return Row(
        key={
            "device": f"desktop, {device}",
            "client": "desktop",
            "model": name,
            "format": artifact.target,
            "backend": runtime.get("name") or "no runtime",
            "threads": latency.threads if latency else runtime.get("threads"),
            "precision": artifact.precision.value,
            "repetition": 1,
        },
        source=f"{bundle.path.name}/report.json",
        model_sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        agreement=_agreement(parity),
        accuracy=_accuracy(parity),
        preprocessing=InputCheck(not_run="the evaluation set is preprocessed already"),
        latency=_timing(latency),
        sustained=Timing({}, not_run="not measured"),
        facts={
            "client": {"name": "flowexport", "version": bundle.manifest["flowexport"]},
            "created": created,
            "device": dict(machine),
            "os": {"name": machine.get("os"), "version": None},
            "browser": None,
            "environment": {
                "load_before": latency.load_before if latency else None,
                "load_after": latency.load_after if latency else None,
            },
            "runtime": {"name": runtime.get("name"), "version": runtime.get("version")},
            "backend": {
                "requested": runtime.get("name"),
                "effective": runtime.get("name"),
                "fallback_reason": None,
            },
            "threads": {"requested": None, "effective": runtime.get("threads")},
            "load": {"cold_ms": None, "fetch_ms": None, "from": None},
            "memory": {"before_bytes": None, "peak_bytes": None, "source": None},
            "power": None,
            "execution": runtime.get("execution"),
        },
        has_evaluation=(bundle.path / "evaluation").is_dir(),
    )


def _agreement(parity: ParityReport | None) -> Agreement:
    if parity is None or parity.verdict is Verdict.NOT_RUN:
        reason = parity.reason if parity else "nobody has verified it"
        return Agreement(not_run=reason, evidence="bundle")
    tolerance = replace(parity.tolerance, max_accuracy_drop=None, min_prediction_agreement=None)
    without = replace(parity, accuracy=None, tolerance=tolerance)
    return Agreement(without.cases, tolerance, "bundle", without.problems)


def _accuracy(parity: ParityReport | None) -> Accuracy:
    if parity is None or parity.accuracy is None:
        expected = parity is not None and any(
            c.startswith(EVALUATION_PREFIX) for c, _ in parity.expected
        )
        return Accuracy(not_run="the evaluation set was not run" if expected else "no set")
    violation = parity.accuracy.violation(parity.tolerance)
    return Accuracy(parity.accuracy, problems=(violation,) if violation else ())


def _timing(latency: LatencyReport | None) -> Timing:
    if latency is None or latency.not_run is not None or not latency.samples_ms:
        return Timing({}, not_run=(latency and latency.not_run) or "not measured")
    return Timing({"inference_ms": latency.samples_ms}, warmup=latency.warmup, batch=1)
