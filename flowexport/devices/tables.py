"""The comparison as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from flowexport.report.format import DASH, number, percent, size

COLUMNS = (
    "device", "client", "model", "format", "backend", "threads", "precision", "repetition",
    "verdict", "runtime", "agreement", "max_abs", "max_rel", "accuracy_verdict", "correct",
    "samples", "accuracy", "preprocessing", "latency", "runs", "p50_ms", "p90_ms", "p99_ms",
    "min_ms", "min_over_desktop", "cold_load_ms", "size_bytes",
    "peak_memory_bytes", "problems", "not_run", "source",
)  # fmt: skip


def to_csv(document: Mapping[str, Any]) -> str:
    """Return one line a row; what is unknown is empty, never zero."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in document["rows"]:
        flat = {**_flat(row), "min_over_desktop": over_desktop(document, row)}
        writer.writerow({k: _cell(v) for k, v in flat.items()})
    return buffer.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    statistics, facts = row["latency"]["statistics"], row["facts"]
    return {
        **row["key"],
        "verdict": row["verdict"],
        "runtime": runtime(row),
        "agreement": row["agreement"]["verdict"],
        "max_abs": row["agreement"]["max_abs"],
        "max_rel": row["agreement"]["max_rel"],
        "accuracy_verdict": row["accuracy"]["verdict"],
        "correct": row["accuracy"]["correct"],
        "samples": row["accuracy"]["samples"],
        "accuracy": row["accuracy"]["accuracy"],
        "preprocessing": row["preprocessing"]["verdict"],
        "latency": row["latency"]["verdict"],
        "runs": len(row["latency"]["inference_ms"] or ()) or None,
        "p50_ms": statistics["latency_ms_p50"],
        "p90_ms": statistics["latency_ms_p90"],
        "p99_ms": statistics["latency_ms_p99"],
        "min_ms": statistics["latency_ms_min"],
        "cold_load_ms": facts["load"]["cold_ms"],
        "size_bytes": row["size_bytes"],
        "peak_memory_bytes": facts["memory"]["peak_bytes"],
        "problems": "; ".join(row["problems"]),
        "not_run": "; ".join(row["gaps"]),
        "source": row["source"],
    }


def over_desktop(document: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Return a row's fastest run over the fastest of the same file run natively on a desktop.

    None for desktop rows, and where either has no usable times. It compares
    runtimes only where both ran on one machine.
    """
    own = row["latency"]["statistics"]["latency_ms_min"]
    if own is None or row["key"]["client"] == "desktop":
        return None
    natives = [
        r["latency"]["statistics"]["latency_ms_min"]
        for r in document["rows"]
        if r["key"]["client"] == "desktop"
        and r["facts"].get("execution") == "native"
        and r["model_sha256"] == row["model_sha256"]
    ]
    fastest = min((n for n in natives if n), default=None)
    return own / fastest if fastest else None


def _cell(value: Any) -> Any:
    """Keep a report's text from being a formula in a spreadsheet."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value


def runtime(row: Mapping[str, Any]) -> str:
    """Return runtime and version, and how it executed where that was not natively."""
    facts = row["facts"]
    parts = [facts["runtime"]["name"], facts["runtime"]["version"]]
    text = " ".join(str(p) for p in parts if p) or "unknown"
    execution = facts.get("execution")
    return text if execution in (None, "native") else f"{text} ({execution})"


def to_markdown(document: Mapping[str, Any]) -> str:
    """Return the comparison for a pull request or an issue."""
    lines = [
        f"# Device comparison: {document['verdict'].replace('_', ' ')}",
        "",
        f"{len(document['rows'])} runs of {len(document['inputs'])} reports,"
        f" {document['generated']}, flowexport {document['flowexport']}. Every number is computed"
        " from the reports' raw data.",
        "",
    ]
    models = dict.fromkeys(r["key"]["model"] for r in document["rows"])
    for model in models:
        lines += [f"## {_text(model)}", ""]
        rows = [r for r in document["rows"] if r["key"]["model"] == model]
        lines += _table(
            ["device · backend", "format", "verdict", "max rel", "accuracy", "p50 ms", "p99 ms",
             "min ms", "min ÷ desktop", "load ms", "size"],
            [_markdown_row(document, r) for r in rows],
        )  # fmt: skip
        notes = [(r, p) for r in rows for p in r["problems"]]
        lines += [f"- **{_text(r['label'])}, {r['key']['format']}**: {_text(p)}" for r, p in notes]
        lines += [""] * bool(notes)
    if document["difference"]:
        lines += _difference(document["difference"])
    return "\n".join(lines).rstrip() + "\n"


def _markdown_row(document: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    times, accuracy = row["latency"]["statistics"], row["accuracy"]
    share = percent(accuracy["accuracy"])
    if accuracy["samples"]:
        share += f" ({accuracy['correct']}/{accuracy['samples']})"
    return [
        row["label"],
        row["key"]["format"],
        row["verdict"].replace("_", " "),
        number(row["agreement"]["max_rel"]),
        share,
        number(times["latency_ms_p50"]),
        number(times["latency_ms_p99"]),
        number(times["latency_ms_min"]),
        number(over_desktop(document, row)),
        number(row["facts"]["load"]["cold_ms"]),
        size(row["size_bytes"]),
    ]


def _difference(difference: Mapping[str, Any]) -> list[str]:
    against = difference["against"]
    lines = [f"## Since {_text(against['name'])} of {against['generated']}", ""]
    entries = [e for e in difference["entries"] if e["change"] != "same"]
    if not entries:
        lines += ["Nothing changed beyond noise.", ""]
    else:
        lines += _table(
            ["change", "row", "what", "before", "now", "ratio", "95 %"],
            [
                [
                    e["change"],
                    f"{e['key']['model']} {e['key']['format']}, {e['label']}",
                    what(e),
                    number(e["before"]),
                    number(e["after"]),
                    number(e["ratio"]),
                    DASH if e["ci_low"] is None else f"{e['ci_low']:.2f} to {e['ci_high']:.2f}",
                ]
                for e in entries
            ],
        )
    return [*lines, difference["rule"], ""]


def what(entry: Mapping[str, Any]) -> str:
    """Say which number of a row changed."""
    metric, note = entry["metric"], entry["note"]
    return str(note) if metric == "row" else f"{metric}: {note}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *[[_text(c) for c in row] for row in rows]]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _text(value: object) -> str:
    """Escape what Markdown and HTML would read as markup."""
    text = " ".join(str(value).split())
    for char in "\\`*_{}[]|#~":
        text = text.replace(char, f"\\{char}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
