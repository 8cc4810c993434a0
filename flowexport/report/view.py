"""What the page shows, read out of the manifest and the report; layout is the template's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowexport.core.findings import OUTSIDE
from flowexport.report import svg
from flowexport.report.format import number, percent, size
from flowexport.report.lengths import lengths
from flowexport.report.ranges import range_check
from flowexport.report.streaming import streaming

VERDICT_WORDS = {
    "PASS": "Every expected comparison was made and is within its tolerance.",
    "FAIL": "Something is not as it must be.",
    "NOT_RUN": "Not executed here, so nothing is claimed.",
}
# Best evidence last: a reader looks for trouble first.
ORDER = {"FAIL": 0, "NOT_RUN": 1, "PASS": 2}


def page(manifest: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of the page; plots are markup, everything else is text."""
    from markupsafe import Markup

    targets = [_target(n, e, manifest) for n, e in document["targets"].items()]
    model = manifest.get("model")
    model = dict(model) if isinstance(model, Mapping) else {"name": model}
    plots = {
        "errors": _errors(targets),
        "accuracy": _accuracy(targets),
        "latency": _latency(targets),
        "sizes": _sizes(targets, model.get("parameters")),
    }
    for plot in plots.values():
        for row in (*plot["rows"], plot):
            if "svg" in row:
                row["svg"] = Markup(row["svg"])
    for target in targets:
        for case in target["cases"]:
            case["svg"] = Markup(case["svg"])
        target["axis"] = Markup(target["axis"])
    stream = streaming(targets, manifest)
    buckets = lengths(targets, manifest)
    if stream is not None and stream["plot"]:
        stream["plot"] = Markup(stream["plot"])
    counts = {v: sum(t["verdict"] == v for t in targets) for v in VERDICT_WORDS}
    return {
        "name": document["name"],
        "verdict": document["verdict"],
        "headline": _headline(counts),
        "generated": document["generated"].replace("T", " ").replace("+00:00", " UTC"),
        "flowexport": document["flowexport"],
        "model": model,
        "description": manifest.get("description") or model.get("description"),
        "facts": _facts(manifest, model, targets),
        "targets": targets,
        "plots": plots,
        "streaming": stream,
        "buckets": buckets,
        "machine": _machine(document["machine"]),
        "environment": _environment(manifest),
        "files": sorted(manifest.get("files", {}).items()),
    }


def _headline(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = [f"{counts['PASS']} of {total} targets pass"]
    if counts["FAIL"]:
        parts.append(f"{counts['FAIL']} fail")
    if counts["NOT_RUN"]:
        parts.append(f"{counts['NOT_RUN']} could not run here")
    return ", ".join(parts)


def _target(name: str, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(manifest.get("targets", {}).get(name, {}))
    if made.get("functions"):  # those of a causal model may have files of their own
        sizes = {f["path"]: f["size_bytes"] for f in made["functions"].values()}
        made["size_bytes"] = sum({**sizes, made["path"]: made["size_bytes"]}.values())
    parity, times = entry["parity"] or {}, entry["latency"] or {}
    details = dict(made.get("details") or {})
    tolerance = dict(parity.get("tolerance") or made.get("tolerance") or {})
    verdict = entry["verdict"]
    reason = parity.get("reason") if parity else "Nobody has verified it yet."
    cases = _cases(parity.get("cases", []), tolerance)
    operators = details.pop("operators", None)
    sites = [details.pop(key) for key in ("attentions", "sites") if key in details]
    deterministic = made.get("deterministic")
    return {
        "name": name,
        "anchor": "target-" + "".join(c if c.isalnum() else "-" for c in name),
        "made": made,
        "verdict": verdict,
        "words": _words(verdict, cases),
        "reason": reason,
        "fix": parity.get("fix") or (None if parity else "flowexport verify BUNDLE"),
        "problems": parity.get("problems", []),
        "runtime": parity.get("runtime"),
        "execution": parity.get("execution"),
        "parity": parity,
        "tolerance": tolerance,
        "limits": _limits(tolerance),
        "cases": cases,
        "axis": svg.axis_row(_axis(parity.get("cases", []), tolerance)) if cases else "",
        "evaluation": parity.get("evaluation"),
        "latency": times,
        "operators": _operators(operators),
        "fusions": {k: n for k, n in (made.get("fusions") or {}).items() if n},
        "required_fusions": dict(made.get("required_fusions") or {}),
        "sites": _sites(sites[0]) if sites else [],
        "range_check": range_check(made.get("range_check")),
        "deterministic": deterministic if isinstance(deterministic, Mapping) else {},
        "toolchain": dict(made.get("toolchain") or {}),
        "options": dict(made.get("options") or {}),
        "conversion": dict(made.get("conversion") or {}),
        "warnings": details.pop("warnings", None) or [],
        "delegation": _delegation(details.pop("delegation", None)),
        "details": {k: v for k, v in details.items() if not str(k).startswith("deterministic")},
    }


def _words(verdict: str, cases: Sequence[Mapping[str, Any]]) -> str:
    outside = sum(c["verdict"] == OUTSIDE for c in cases)
    if verdict != "PASS" or not outside:
        return VERDICT_WORDS[verdict]
    return (
        f"Every expected comparison was made, and all but {outside} are within its tolerance."
        f" {outside} of drawn inputs lie outside the calibrated ranges: not judged."
    )


def _delegation(entry: Any) -> dict[str, Any]:
    """Return how XNNPACK takes each signature; bundles of old have it for one, without a name."""
    found = entry if isinstance(entry, Mapping) else {}
    return {n: s for n, s in found.items() if isinstance(s, Mapping) and "outside" in s}


def _axis(cases: Sequence[Mapping[str, Any]], tolerance: Mapping[str, Any]) -> svg.Axis:
    errors = [c["max_rel"] for c in cases if c["max_rel"] is not None]
    return svg.error_axis(errors, [float(tolerance.get("max_rel", 0.0))])


def _cases(
    cases: Sequence[Mapping[str, Any]], tolerance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the comparisons, failed ones first, then the largest error first."""
    axis = _axis(cases, tolerance)
    order = sorted(
        cases, key=lambda c: (c["verdict"] != "FAIL", c["verdict"] == OUTSIDE, -(c["max_rel"] or 0))
    )
    limit = float(tolerance.get("max_rel", 0.0))
    rows = []
    for case in order:
        error = case["max_rel"]
        text = f"max rel {number(error)}, tolerance {number(limit)}"
        if case["verdict"] == OUTSIDE:
            text = f"max rel {number(error)}, outside the calibrated ranges, not judged"
        mark = [] if error is None else [(error, svg.KINDS[case["verdict"]], text)]
        label = f"{case['case']} {case['output']}: {text}"
        rows.append({**case, "svg": svg.dots(axis, mark, limit, label)})
    return rows


def _limits(tolerance: Mapping[str, Any]) -> list[str]:
    words = {
        "max_rel": "max rel ≤ {}",
        "min_cosine": "cosine ≥ {}",
        "min_sqnr_db": "SQNR ≥ {} dB",
        "min_top1_agreement": "top-1 agreement ≥ {}",
        "max_accuracy_drop": "accuracy drop ≤ {} points",
        "min_prediction_agreement": "same predictions ≥ {}",
    }
    return [
        text.format(f"{tolerance[key]:g}")
        for key, text in words.items()
        if tolerance.get(key) is not None
    ]


def _errors(targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row a target: every comparison against the tolerance, on one scale."""
    ran = [t for t in targets if t["cases"]]
    values = [c["max_rel"] for t in ran for c in t["cases"] if c["max_rel"] is not None]
    axis = svg.error_axis(values, [t["tolerance"]["max_rel"] for t in ran])
    rows: list[dict[str, Any]] = []
    for t in ran:
        marks = [
            (c["max_rel"], svg.KINDS[c["verdict"]], f"{c['case']}: {number(c['max_rel'])}")
            for c in t["cases"]
            if c["max_rel"] is not None
        ]
        unmeasured = sum(c["max_rel"] is None for c in t["cases"])
        worst = number(t["parity"]["max_rel"])
        outside = sum(c["verdict"] == OUTSIDE for c in t["cases"])
        note = f"{len(t['cases'])} compared" + (f", {unmeasured} unusable" if unmeasured else "")
        note += f", {outside} outside the calibrated ranges" if outside else ""
        label = f"{t['name']}: worst {worst}, tolerance {number(t['tolerance']['max_rel'])}"
        rows.append(
            {
                "label": t["name"],
                "verdict": t["verdict"],
                "value": f"worst {worst}",
                "note": note,
                "svg": svg.dots(axis, marks, t["tolerance"]["max_rel"], label),
            }
        )
    return {"rows": rows, "svg": svg.axis_row(axis)}


def _accuracy(targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ran = [t for t in targets if t["evaluation"]]
    if not ran:
        return {"rows": [], "dataset": None, "samples": 0}
    first = ran[0]["evaluation"]
    share = first["reference_accuracy"] or 0.0
    rows = [
        {
            "label": "PyTorch",
            "verdict": None,
            "value": percent(share),
            "note": f"reference, float64: {first['reference_correct']} of {first['samples']} right",
            "svg": svg.bar(share, "reference", f"PyTorch reference: {percent(share)}"),
        }
    ]
    for t in ran:
        found = t["evaluation"]
        text = percent(found["accuracy"])
        note = (
            f"{found['correct']} of {found['samples']} right; "
            f"{found['agreement']} of {found['samples']} predicted as PyTorch does"
        )
        if found["lost"] or found["gained"]:
            note += f"; {found['lost']} lost, {found['gained']} gained"
            if found.get("p_value") is not None:
                note += f", exact McNemar p = {found['p_value']:.2g}"
        kind = "good" if found["verdict"] == "PASS" else "bad"
        rows.append(
            {
                "label": t["name"],
                "verdict": found["verdict"],
                "value": text,
                "note": note,
                "svg": svg.bar(found["accuracy"] or 0.0, kind, f"{t['name']}: {text}"),
            }
        )
    return {"rows": rows, "dataset": first["dataset"], "samples": first["expected_samples"]}


def _latency(targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    timed = [t for t in targets if t["latency"].get("samples_ms")]
    skipped = [t for t in targets if t["latency"] and t["latency"].get("not_run")]
    axis = svg.time_axis([s for t in timed for s in t["latency"]["samples_ms"]])
    rows = []
    for t in timed:
        times = t["latency"]
        p50, p99 = times["latency_ms_p50"], times["latency_ms_p99"]
        threads = times["threads"]
        note = f"{times['iterations']} runs, {threads} thread{'' if threads == 1 else 's'}"
        if times["execution"] not in (None, "native"):
            note += f", {times['execution']}: not a device's speed"
        label = f"{t['name']}: median {number(p50)} ms, p99 {number(p99)} ms, {note}"
        rows.append(
            {
                "label": t["name"],
                "verdict": None,
                "value": f"{number(p50)} ms",
                "note": f"p90 {number(times['latency_ms_p90'])}, p99 {number(p99)} ms; {note}",
                "svg": svg.strip(axis, times["samples_ms"], label),
            }
        )
    plot: dict[str, Any] = {"rows": rows, "svg": svg.axis_row(axis, "ms"), "log": axis.log}
    plot["skipped"] = [(t["name"], t["latency"]["not_run"]) for t in skipped]
    plot["conditions"] = _conditions(timed[0]["latency"]) if timed else []
    plot["many"] = any(t["latency"]["iterations"] > svg.MAX_MARKS for t in timed)
    plot["busy"] = _busy(timed[0]["latency"]) if timed else None
    return plot


def _conditions(times: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = times["machine"]
    shapes = "; ".join(
        f"{name} {'×'.join(str(d) for d in shape)}" for name, shape in times["input_shapes"].items()
    )
    load = f"{number(times['load_before'])} before, {number(times['load_after'])} after"
    return [
        ("Input", shapes),
        ("CPU", str(machine.get("cpu") or "unknown")),
        ("Usable cores", str(machine.get("cores_usable") or "unknown")),
        ("Governor", str(machine.get("governor") or "not readable")),
        ("Load average", load),
        ("Warm-up", f"{times['warmup']} runs"),
    ]


def _busy(times: Mapping[str, Any]) -> str | None:
    load, cores = times["load_after"], times["machine"].get("cores_usable")
    if load is None or not cores or load <= cores:
        return None
    return (
        f"The machine was busy (load {number(load)} on {cores} cores): "
        "compare these times with each other, not with another day's."
    )


def _sizes(targets: Sequence[Mapping[str, Any]], parameters: Any) -> dict[str, Any]:
    made = [t for t in targets if t["made"].get("size_bytes")]
    weights = 4 * parameters if isinstance(parameters, int) and parameters > 0 else None
    largest = max((*(t["made"]["size_bytes"] for t in made), weights or 0), default=0)
    rows = []
    if weights and made:
        rows.append(
            {
                "label": "weights",
                "verdict": None,
                "value": size(weights),
                "note": f"{parameters:,} parameters of 4 bytes, for comparison",
                "svg": svg.bar(weights / largest, "reference", f"weights: {size(weights)}"),
            }
        )
    for t in made:
        count = t["made"]["size_bytes"]
        note = str(t["made"].get("precision", ""))
        if weights:
            note += f", {count / weights:.2f}× the fp32 weights"
        rows.append(
            {
                "label": t["name"],
                "verdict": None,
                "value": size(count),
                "note": note,
                "svg": svg.bar(count / largest, "plain", f"{t['name']}: {size(count)}"),
            }
        )
    return {"rows": rows}


def _operators(operators: Any) -> list[tuple[str, int]]:
    if not isinstance(operators, Mapping):
        return []
    counted = [(str(k), v) for k, v in operators.items() if isinstance(v, int)]
    return sorted(counted, key=lambda pair: (-pair[1], pair[0]))


def _sites(sites: Any) -> list[dict[str, Any]]:
    """Group attention sites by form and reason, so that 19 alike are one row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site in sites if isinstance(sites, Sequence) else []:
        if isinstance(site, Mapping):
            place = str(site.get("module") or site.get("module_path") or site.get("name") or "?")
            key = (str(site.get("form") or "fused node"), str(site.get("reason") or ""))
            groups.setdefault(key, []).append(place)
    return [
        {"form": form, "reason": reason, "places": places}
        for (form, reason), places in groups.items()
    ]


def _facts(
    manifest: Mapping[str, Any], model: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    def specs(key: str) -> str:
        return "; ".join(
            f"{s['name']} {'×'.join(str(d) for d in s['shape'])} {s['dtype']}"
            for s in manifest.get(key, [])
        )

    facts = [("Model", str(model.get("name") or "unknown"))]
    if isinstance(model.get("parameters"), int):
        facts.append(("Parameters", f"{model['parameters']:,}"))
    if model.get("attentions") is not None:
        facts.append(("Attention sites", str(model["attentions"])))
    precisions = sorted({str(t["made"]["precision"]) for t in targets if "precision" in t["made"]})
    facts += [("Precision", ", ".join(precisions)), ("Weights", str(model.get("weights") or ""))]
    facts += [("Inputs", specs("inputs")), ("Outputs", specs("outputs"))]
    labels = manifest.get("labels") or []
    if labels:
        shown = ", ".join(str(x) for x in labels[:6]) + (" …" if len(labels) > 6 else "")
        facts.append(("Classes", f"{len(labels)}: {shown}"))
    return [(k, v) for k, v in facts if v]


def _machine(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    words = {
        "cpu": "CPU",
        "architecture": "Architecture",
        "cores_usable": "Usable cores",
        "governor": "Governor",
        "memory_bytes": "Memory",
        "os": "Operating system",
        "python": "Python",
    }
    rows = []
    for key, text in words.items():
        value = machine.get(key)
        if value is not None:
            rows.append((text, size(value) if key.endswith("bytes") else str(value)))
    return rows


def _environment(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(f"{k}", str(v)) for k, v in manifest.get("versions", {}).items() if v]
    model = manifest.get("model")
    hashes = {"Recipe sha256": manifest.get("recipe_sha256")}
    if isinstance(model, Mapping):
        hashes["Weights sha256"] = model.get("weights_sha256")
    return rows + [(k, str(v)) for k, v in hashes.items() if v]
