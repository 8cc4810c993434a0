"""report.json and report.html of a bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowexport import __version__
from flowexport.core.errors import BundleError
from flowexport.core.reports import LatencyReport, ParityReport, verdict_of
from flowexport.core.types import Verdict
from flowexport.report.html import render_html
from flowexport.report.schema import validate

SCHEMA = "flowexport.bundle-report/1"


def build_report(
    manifest: Mapping[str, Any],
    parity: Mapping[str, ParityReport],
    latency: Mapping[str, LatencyReport],
) -> dict[str, Any]:
    """Return the document of report.json.

    Every target of the manifest is in it: one that nobody verified is NOT_RUN.

    Raises:
        BundleError: the document does not follow its schema.
    """
    names = [*manifest.get("targets", {})]
    names += [n for n in (*parity, *latency) if n not in names]
    targets = {}
    for name in dict.fromkeys(names):
        found, times = parity.get(name), latency.get(name)
        targets[name] = {
            "verdict": (found.verdict if found else Verdict.NOT_RUN).value,
            "parity": found.to_json() if found else None,
            "latency": times.to_json() if times else None,
        }
    machine = next((dict(r.machine) for r in latency.values() if r.machine), {})
    document = {
        "schema": SCHEMA,
        "name": bundle_name(manifest),
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "flowexport": __version__,
        "verdict": verdict_of(parity).value,
        "machine": machine,
        "targets": targets,
    }
    validate(document, "report")
    return document


def write_report(
    bundle_dir: Path,
    manifest: Mapping[str, Any],
    parity: Mapping[str, ParityReport],
    latency: Mapping[str, LatencyReport],
) -> None:
    """Write report.json and report.html into a bundle, each in one step."""
    document = build_report(manifest, parity, latency)
    _replace(
        bundle_dir / "report.json",
        json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    )
    _replace(bundle_dir / "report.html", render_html(manifest, document))


def read_report(
    bundle_dir: Path,
) -> tuple[dict[str, ParityReport], dict[str, LatencyReport]]:
    """Read report.json back as evidence; verdicts follow from it anew.

    Raises:
        BundleError: there is none, or it does not follow its schema.
    """
    path = bundle_dir / "report.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"report {bundle_dir}: report.json cannot be read ({error.strerror}).",
            fix=f"flowexport verify {bundle_dir}",
        ) from error
    except ValueError as error:
        raise BundleError(f"report {path}: is no JSON ({error}); expected {SCHEMA}.") from error
    if not isinstance(document, dict):
        raise BundleError(f"report {path}: is no object; expected {SCHEMA}.")
    validate(document, "report")
    entries = document["targets"].items()
    return (
        {n: ParityReport.from_json(e["parity"]) for n, e in entries if e["parity"]},
        {n: LatencyReport.from_json(e["latency"]) for n, e in entries if e["latency"]},
    )


def bundle_name(manifest: Mapping[str, Any]) -> str:
    """Return what a bundle is called: its recipe's name, else its model's."""
    recipe, model = manifest.get("recipe"), manifest.get("model")
    for value in (manifest.get("name"), recipe, model):
        if isinstance(value, Mapping):
            value = value.get("name")
        if isinstance(value, str) and value:
            return value
    return "bundle"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
