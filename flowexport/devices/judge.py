"""From a device report's raw data to findings; no summary of the report's is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flowexport.core.errors import InputError, VerificationError
from flowexport.core.reports import AccuracyResult, CaseResult, ParityReport
from flowexport.devices.reading import decode
from flowexport.devices.references import Key, Reference
from flowexport.devices.rows import Accuracy, Agreement, InputCheck, Row
from flowexport.devices.timing import Timing
from flowexport.parity import compare

NO_REFERENCE = "no package or bundle of this model was given (--package, --bundle)"


def judge_report(
    report: Mapping[str, Any], source: str, references: Mapping[Key, Reference]
) -> list[Row]:
    """Judge every run of a device report.

    Args:
        report: ``flowexport.report/1``, validated.
        source: the file's name, for messages.
        references: what is known of each model file; empty: agreement is NOT_RUN.

    Raises:
        InputError: a run of a model that no reference has.
        VerificationError: a run of another file than the reference's.
    """
    return [_judge_run(report, run, source, references) for run in report["runs"]]


def _judge_run(
    report: Mapping[str, Any],
    run: Mapping[str, Any],
    source: str,
    references: Mapping[Key, Reference],
) -> Row:
    # The step of a causal model is a file of its own, held against the same golden rows.
    step = run.get("entry") == "step"
    key = (run["model"], f"{run['format']} step" if step else run["format"])
    reference = references.get(key)
    if reference is None and references:
        known = ", ".join(" ".join(k) for k in sorted(references))
        raise InputError(
            f"merge {source}: a run is of {' '.join(key)}; expected one of: {known}.",
            fix="give the package that the device ran with --package",
        )
    found = run["model_sha256"]
    if reference is not None and found is not None and found != reference.sha256:
        raise VerificationError(
            f"merge {source}: {' '.join(key)} ran a file of sha256 {found[:12]}…;"
            f" expected {reference.sha256[:12]}… as {reference.origin} has.",
            fix="measure again with the package, or give the package that the device ran",
        )
    device, backend = report["device"], run["backend"]
    return Row(
        key={
            "device": device["label"],
            "client": report["client"]["kind"],
            "model": key[0],
            "format": key[1],
            "backend": backend["effective"] or f"{backend['requested']} (not confirmed)",
            "threads": run["threads"]["effective"],
            "precision": run["precision"],
            "repetition": 1,
        },
        source=source,
        model_sha256=found,
        size_bytes=reference.size_bytes if reference else run["model_size_bytes"],
        agreement=_agreement(run, reference),
        accuracy=_accuracy(run["evaluation"], reference),
        preprocessing=_inputs(run["preprocessing"], reference),
        latency=Timing.from_report(run["latency"]),
        sustained=Timing.from_report(run["sustained"]),
        facts={
            "client": dict(report["client"]),
            "created": report["created"],
            "device": dict(device),
            "os": dict(report["os"]),
            "browser": report["browser"],
            "environment": dict(report["environment"]),
            "runtime": dict(run["runtime"]),
            "backend": dict(backend),
            "threads": dict(run["threads"]),
            "load": dict(run["load"]),
            "memory": dict(run["memory"]),
            "power": dict(run["power"]),
            "execution": "native",
        },
        errors=[*report["errors"], *run["errors"]],
        has_evaluation=reference is not None and reference.targets is not None,
    )


def _agreement(run: Mapping[str, Any], reference: Reference | None) -> Agreement:
    if reference is None:
        return Agreement(not_run=NO_REFERENCE)
    if run["golden"] is None:
        return Agreement(not_run="the golden cases were not run", tolerance=reference.tolerance)
    # The accuracy has a verdict of its own.
    tolerance = replace(reference.tolerance, max_accuracy_drop=None, min_prediction_agreement=None)
    found = ParityReport(
        target=run["format"],
        artifact_sha256=run["model_sha256"],
        manifest_sha256=reference.sha256,
        tolerance=tolerance,
        reference="the package's golden outputs",
        expected=tuple((c, o) for c, outputs in reference.expected.items() for o in outputs),
        cases=tuple(_cases(run["golden"], reference)),
    )
    return Agreement(cases=found.cases, tolerance=tolerance, problems=found.problems)


def _cases(golden: Sequence[Mapping[str, Any]], reference: Reference) -> list[CaseResult]:
    results = []
    for case in golden:
        name = case["name"]
        expected = reference.expected.get(name, {})
        if case["error"] is not None:
            results += [CaseResult(name, o, problem=f"failed: {case['error']}") for o in expected]
            continue
        for tensor in case["outputs"]:
            output, value = tensor["name"], decode(tensor)
            if isinstance(value, str):
                results.append(CaseResult(name, output, problem=value))
            elif output in expected:
                dtype = reference.dtypes.get(output, "float32")
                found = compare(name, output, value, expected[output], dtype=dtype)
                results.append(replace(found, **reference.clipping.get(name, {})))
            else:
                results.append(CaseResult(name, output, problem="is no golden output"))
    return results


def _accuracy(evaluation: Mapping[str, Any] | None, reference: Reference | None) -> Accuracy:
    if reference is None:
        return Accuracy(not_run=NO_REFERENCE)
    if reference.targets is None or reference.top1 is None:
        return Accuracy(not_run="the package has no evaluation set")
    if evaluation is None:
        return Accuracy(not_run="the evaluation set was not run")
    given, total = evaluation["predictions"], len(reference.targets)
    problems = []
    if evaluation["name"] != reference.dataset:
        problems.append(f"the set is {evaluation['name']!r}; expected {reference.dataset!r}")
    if len(given) != total:
        problems.append(f"{len(given)} samples were predicted; expected {total}")
    missing = sum(p is None for p in given)
    if missing:
        problems.append(f"{missing} of {len(given)} samples have no prediction")
    classes = reference.classes
    strange = sum(p is not None and (p < 0 or (classes or p + 1) <= p) for p in given)
    if strange:
        problems.append(f"{strange} predictions are no class; expected 0 to {(classes or 0) - 1}")
    if problems:
        return Accuracy(problems=tuple(problems))
    ours, theirs, targets = np.array(given), reference.top1, reference.targets
    right, reference_right = ours == targets, theirs == targets
    result = AccuracyResult(
        dataset=str(reference.dataset),
        expected_samples=total,
        samples=len(given),
        correct=int(right.sum()),
        reference_correct=int(reference_right.sum()),
        agreement=int((ours == theirs).sum()),
        lost=int((reference_right & ~right).sum()),
        gained=int((right & ~reference_right).sum()),
    )
    violation = result.violation(reference.tolerance)
    return Accuracy(result, problems=(violation,) if violation else ())


def _inputs(checks: Sequence[Mapping[str, Any]] | None, reference: Reference | None) -> InputCheck:
    if reference is None:
        return InputCheck(not_run=NO_REFERENCE)
    if not reference.inputs:
        return InputCheck(not_run="the reference has no golden preprocessing")
    if checks is None:
        return InputCheck(not_run="the preprocessing was not checked")
    problems: list[str] = []
    errors: list[float] = []
    seen = [(c["source"], c["case"]) for c in checks]
    for pair in reference.inputs:
        if seen.count(pair) != 1:
            problems.append(f"{' '.join(pair)} was checked {seen.count(pair)} times; expected once")
    for check in checks:
        where = f"{check['source']} {check['case']}"
        expected = reference.inputs.get((check["source"], check["case"]))
        if expected is None:
            problems.append(f"{where} is no golden sample")
            continue
        if check["error"] is not None:
            problems.append(f"{where} failed: {check['error']}")
            continue
        names = [t["name"] for t in check["inputs"]]
        if sorted(names) != sorted(expected):
            problems.append(f"{where} made {sorted(names)}; expected {sorted(expected)}")
            continue
        limit = reference.input_max_abs[check["source"]]
        for tensor in check["inputs"]:
            text = _compare_input(tensor, expected[tensor["name"]], limit, errors)
            if text:
                problems.append(f"{where}: {tensor['name']} {text}")
    return InputCheck(len(checks), max(errors, default=None), tuple(problems))


def _compare_input(
    tensor: Mapping[str, Any], expected: np.ndarray, limit: float, errors: list[float]
) -> str | None:
    """Add the largest error to ``errors``; return what is wrong."""
    value = decode(tensor)
    if isinstance(value, str):
        return value
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return (
            f"has {value.dtype.name} {list(value.shape)};"
            f" expected {expected.dtype.name} {list(expected.shape)}"
        )
    if not np.isfinite(value).all():
        return "has values that are not finite"
    error = float(np.abs(value.astype(np.float64) - expected).max())
    errors.append(error)
    return f"differs by {error:.3g}; expected at most {limit:g}" if error > limit else None
