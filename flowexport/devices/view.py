"""comparison.html: what the page shows; layout is the template's, plots are the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowexport.devices.tables import over_desktop, runtime, what
from flowexport.report import svg
from flowexport.report.format import DASH, number, percent, size
from flowexport.report.html import render_page

CHANGE_CLASS = {"worse": "FAIL", "better": "PASS"}
"""Class of a change's badge; anything else is neutral."""


def render_comparison(document: Mapping[str, Any]) -> str:
    """Render ``merge.json`` as one page: no script, no request, every string escaped."""
    return render_page("comparison.html", _page(document))


def _page(document: Mapping[str, Any]) -> dict[str, Any]:
    rows = document["rows"]
    models = [
        _model(document, name, [r for r in rows if r["key"]["model"] == name])
        for name in dict.fromkeys(r["key"]["model"] for r in rows)
    ]
    counts = {v: sum(r["verdict"] == v for r in rows) for v in ("PASS", "FAIL", "NOT_RUN")}
    parts = [f"{counts['PASS']} of {len(rows)} runs pass"]
    parts += [f"{counts['FAIL']} fail"] * bool(counts["FAIL"])
    parts += [f"{counts['NOT_RUN']} are incomplete"] * bool(counts["NOT_RUN"])
    devices = list(dict.fromkeys(r["key"]["device"] for r in rows))
    return {
        "verdict": document["verdict"],
        "headline": ", ".join(parts),
        "generated": document["generated"].replace("T", " ").replace("+00:00", " UTC"),
        "flowexport": document["flowexport"],
        "devices": devices,
        "models": models,
        "inputs": document["inputs"],
        "difference": _difference(document["difference"]),
    }


def _model(
    document: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "name": name,
        "anchor": "model-" + "".join(c if c.isalnum() else "-" for c in name),
        "rows": [{**_row(r), "over": number(over_desktop(document, r))} for r in rows],
        "latency": _latency(rows),
        "errors": _errors(rows),
        "accuracy": _accuracy(rows),
        "sizes": _sizes(rows),
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    facts, times = row["facts"], row["latency"]["statistics"]
    load, memory, backend = facts["load"], facts["memory"], facts["backend"]
    fallback = None
    if backend["fallback_reason"]:
        used = backend["effective"] or "nothing"
        fallback = f"asked for {backend['requested']}, used {used}: {backend['fallback_reason']}"
    return {
        "label": row["label"],
        "format": row["key"]["format"],
        "verdict": row["verdict"],
        "runtime": runtime(row),
        "max_rel": number(row["agreement"]["max_rel"]),
        "max_abs": number(row["agreement"]["max_abs"]),
        "accuracy": percent(row["accuracy"]["accuracy"]),
        "p50": number(times["latency_ms_p50"]),
        "min": number(times["latency_ms_min"]),
        "load": number(load["cold_ms"]),
        "size": size(row["size_bytes"]),
        "problems": row["problems"],
        "gaps": row["gaps"],
        "fallback": fallback,
        "facts": [
            ("Source", row["source"]),
            ("Runtime", runtime(row)),
            ("Backend asked for", backend["requested"]),
            ("Threads asked for", facts["threads"]["requested"]),
            ("Precision", row["key"]["precision"]),
            ("Operating system", _words(facts["os"].get("name"), facts["os"].get("version"))),
            ("Browser", _words(*_two(facts["browser"]))),
            ("Preprocessing", _checked(row["preprocessing"])),
            ("Agreement from", _EVIDENCE[row["agreement"]["evidence"]]),
            ("Before and after the model", _around(times)),
            ("Reading the model", _unit(load["fetch_ms"], "ms")),
            ("Sustained run", _sustained(row["sustained"])),
            ("Memory at the peak", size(memory["peak_bytes"]) if memory["peak_bytes"] else None),
            ("Heat and battery", _power(facts["power"])),
            *[(k.replace("_", " "), v) for k, v in facts["environment"].items()],
            ("sha256", row["model_sha256"]),
        ],
    }


_EVIDENCE = {
    "outputs": "the device's own outputs, computed here",
    "bundle": "flowexport verify, where the bundle was made",
}


def _latency(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    usable = [r for r in rows if r["latency"]["statistics"]["latency_ms_p50"] is not None]
    axis = svg.time_axis([s for r in usable for s in r["latency"]["inference_ms"]])
    lines = []
    for row in usable:
        times, samples = row["latency"]["statistics"], row["latency"]["inference_ms"]
        p50, p99 = number(times["latency_ms_p50"]), number(times["latency_ms_p99"])
        note = f"min {number(times['latency_ms_min'])}, p99 {p99} ms; {len(samples)} runs"
        if row["facts"].get("execution") not in (None, "native"):
            note += f"; {row['facts']['execution']}: not a device's speed"
        label = f"{row['label']}, {row['key']['format']}: median {p50} ms, {note}"
        lines.append(_line(row, f"{p50} ms", note, svg.strip(axis, samples, label)))
    skipped = [
        (f"{r['label']}, {r['key']['format']}", r["latency"]["reason"])
        for r in rows
        if r["latency"]["statistics"]["latency_ms_p50"] is None
    ]
    return {
        "rows": lines,
        "svg": _markup(svg.axis_row(axis, "ms")),
        "log": axis.log,
        "skipped": skipped,
    }


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ran = [r for r in rows if r["agreement"]["cases"]]
    values = [c["max_rel"] for r in ran for c in r["agreement"]["cases"] if c["max_rel"]]
    limits = [float(r["agreement"]["tolerance"]["max_rel"]) for r in ran]
    axis = svg.error_axis(values, limits)
    lines = []
    for row, limit in zip(ran, limits, strict=True):
        cases = row["agreement"]["cases"]
        marks = [
            (c["max_rel"], svg.KINDS[c["verdict"]], f"{c['case']}: {number(c['max_rel'])}")
            for c in cases
            if c["max_rel"] is not None
        ]
        worst, unusable = number(row["agreement"]["max_rel"]), len(cases) - len(marks)
        note = f"{len(cases)} compared" + (f", {unusable} unusable" if unusable else "")
        label = f"{row['label']}, {row['key']['format']}: worst {worst}, tolerance {number(limit)}"
        lines.append(_line(row, f"worst {worst}", note, svg.dots(axis, marks, limit, label)))
    return {"rows": lines, "svg": _markup(svg.axis_row(axis))}


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ran = [r for r in rows if r["accuracy"]["accuracy"] is not None]
    lines = []
    for row in ran:
        found = row["accuracy"]
        text = percent(found["accuracy"])
        note = f"{found['correct']} of {found['samples']} right; {found['agreement']} as PyTorch"
        kind = "good" if found["verdict"] == "PASS" else "bad"
        label = f"{row['label']}, {row['key']['format']}: {text}"
        lines.append(_line(row, text, note, svg.bar(found["accuracy"], kind, label)))
    first = ran[0]["accuracy"] if ran else None
    return {
        "rows": lines,
        "dataset": first and first["dataset"],
        "reference": percent(first["reference_accuracy"]) if first else DASH,
    }


def _sizes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = {r["key"]["format"]: r["size_bytes"] for r in rows if r["size_bytes"]}
    largest = max(known.values(), default=1)
    return {
        "rows": [
            {
                "label": name,
                "value": size(count),
                "note": "",
                "svg": _markup(svg.bar(count / largest, "plain", f"{name}: {size(count)}")),
            }
            for name, count in known.items()
        ]
    }


def _difference(difference: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    order = ("worse", "unknown", "gone", "new", "better", "same")
    entries = sorted(difference["entries"], key=lambda e: order.index(e["change"]))
    shown = [
        {
            **e,
            "badge": CHANGE_CLASS.get(e["change"]),
            "what": what(e),
            "where": f"{e['key']['model']} {e['key']['format']}, {e['label']}",
            "interval": "" if e["ci_low"] is None else f"{e['ci_low']:.2f} to {e['ci_high']:.2f}",
        }
        for e in entries
        if e["change"] != "same"
    ]
    return {
        "against": difference["against"],
        "rule": difference["rule"],
        "entries": shown,
        "same": len(entries) - len(shown),
        "worse": sum(e["change"] == "worse" for e in entries),
    }


def _line(row: Mapping[str, Any], value: str, note: str, plot: str) -> dict[str, Any]:
    label = f"{row['label']}, {row['key']['format']}"
    return {"label": label, "value": value, "note": note, "svg": _markup(plot)}


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _words(*parts: Any) -> str | None:
    return " ".join(str(p) for p in parts if p) or None


def _two(browser: Mapping[str, Any] | None) -> tuple[Any, Any]:
    return (browser["name"], browser["version"]) if browser else (None, None)


def _unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{number(value)} {unit}"


def _around(times: Mapping[str, Any]) -> str | None:
    if times["pre_ms_p50"] is None and times["post_ms_p50"] is None:
        return None
    return f"median {number(times['pre_ms_p50'])} and {number(times['post_ms_p50'])} ms"


def _checked(found: Mapping[str, Any]) -> str:
    if not found["compared"]:
        return f"not checked: {found['reason']}"
    return f"{found['compared']} golden samples, largest error {number(found['max_abs'])}"


def _sustained(timing: Mapping[str, Any]) -> str | None:
    p50 = timing["statistics"]["latency_ms_p50"]
    if p50 is None:
        return None if timing["inference_ms"] is None else f"unusable: {timing['reason']}"
    samples = timing["inference_ms"]
    tenth = max(1, len(samples) // 10)
    first, last = (sorted(s)[tenth // 2] for s in (samples[:tenth], samples[-tenth:]))
    return (
        f"{len(samples)} runs, median {number(p50)} ms; first tenth {number(first)},"
        f" last tenth {number(last)} ms"
    )


def _power(power: Mapping[str, Any] | None) -> str | None:
    if power is None:
        return None
    sides = []
    for side in ("start", "end"):
        found = power[side]
        level = None if found["battery_level"] is None else percent(found["battery_level"])
        charging = {True: "charging", False: "on battery", None: None}[found["charging"]]
        sides.append(_words(found["thermal"], level, charging))
    return None if not any(sides) else f"{sides[0] or DASH} at start, {sides[1] or DASH} at end"
