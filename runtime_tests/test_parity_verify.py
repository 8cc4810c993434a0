"""The verdict: what passes, and everything that must not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence_fakes import (
    CLASSES,
    TOLERANCE,
    FakeTarget,
    evaluation,
    golden,
    unavailable,
    weights,
)

from flowexport.core.errors import InputError
from flowexport.core.reports import ParityReport, Tolerance
from flowexport.core.types import Options, Verdict
from flowexport.parity import Golden, run_batched, verdict_of, verify_artifact

GOLDEN, EVALUATION = golden(), evaluation()
FUSIONS = {"FlowAttention": 2}


def verify(target: FakeTarget, folder: Path, **overrides: object) -> ParityReport:
    artifact = target.convert(None, Options(), folder)
    arguments: dict[str, object] = {"check_hash": True, "require_fusions": FUSIONS, **overrides}
    return verify_artifact(target, artifact, GOLDEN, EVALUATION, TOLERANCE, **arguments)


def test_sound_artifact_passes(tmp_path: Path) -> None:
    report = verify(FakeTarget(), tmp_path)
    assert report.verdict is Verdict.PASS, report.reason
    assert report.reason is None and report.problems == ()
    assert len(report.cases) == len(report.expected) == 2 * len(GOLDEN.cases) + 1
    assert report.accuracy is not None
    assert (report.accuracy.samples, report.accuracy.agreement) == (40, 40)
    assert report.accuracy.accuracy == pytest.approx(0.9)
    assert report.max_rel is not None and 0 < report.max_rel < 1e-5
    assert report.runtime_label is not None and report.runtime_label.startswith("numpy ")


def test_report_survives_json_and_its_verdict_cannot_be_edited(tmp_path: Path) -> None:
    report = verify(FakeTarget(), tmp_path)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert ParityReport.from_json(data).to_json() == report.to_json()
    broken = verify(FakeTarget(damage=lambda r: {**r, "logits": r["logits"] + 1}), tmp_path)
    data = json.loads(json.dumps(broken.to_json(), allow_nan=False))
    data["verdict"], data["reason"], data["problems"] = "PASS", None, []
    for case in data["cases"]:
        case["verdict"], case["reason"] = "PASS", None
    assert ParityReport.from_json(data).verdict is Verdict.FAIL


def corrupted(scale: float) -> FakeTarget:
    parameters = weights()
    parameters["w"][1, 2] *= scale
    return FakeTarget(parameters=parameters)


def reversed_scores(result: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return {**result, "logits": result["logits"][:, ::-1].copy()}


def one_nan(result: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    result["logits"][-1, -1] = np.nan
    return result


DAMAGES = {
    "weight-zeroed": corrupted(0.0),
    "weight-sign": corrupted(-1.0),
    "weight-off-by-1e-3": corrupted(1.001),
    "half-precision": FakeTarget(dtype=np.float16),
    "labels-reversed": FakeTarget(damage=reversed_scores),
    "nan": FakeTarget(damage=one_nan),
    "infinity": FakeTarget(damage=lambda r: {**r, "state": r["state"] / 0 * np.float32(1)}),
    "constant": FakeTarget(damage=lambda r: {k: np.zeros_like(v) for k, v in r.items()}),
    "constant-of-first-case": FakeTarget(
        damage=lambda r: {
            k: np.repeat(GOLDEN.expected["random-0"][k], len(v), 0).astype(np.float32)
            for k, v in r.items()
        }
    ),
    "rows-rolled": FakeTarget(
        damage=lambda r: {k: np.roll(v, 1, axis=0) for k, v in r.items()}
    ),
    "outputs-swapped": FakeTarget(
        damage=lambda r: {"logits": r["state"], "state": r["logits"]}
    ),
    "output-missing": FakeTarget(damage=lambda r: {"logits": r["logits"]}),
    "dtype-float64": FakeTarget(damage=lambda r: {k: v.astype(np.float64) for k, v in r.items()}),
    "shape-transposed": FakeTarget(damage=lambda r: {**r, "logits": r["logits"].T}),
    "shape-extra-dimension": FakeTarget(damage=lambda r: {**r, "logits": r["logits"][None]}),
    "scalar": FakeTarget(damage=lambda r: {**r, "logits": np.float32(1)}),
    "class-missing": FakeTarget(damage=lambda r: {**r, "logits": r["logits"][:, 1:]}),
    "fusion-missing": FakeTarget(fusions={}),
    "fusion-partial": FakeTarget(fusions={"FlowAttention": 1}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_without_the_hash(kind: str, tmp_path: Path) -> None:
    report = verify(DAMAGES[kind], tmp_path, check_hash=False)
    assert report.verdict is Verdict.FAIL
    assert report.reason and "Traceback" not in report.reason
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("batch", [1, 4], ids=["batch-1", "batch-4"])
def test_fixed_batch_runs_everything_and_is_as_strict(batch: int, tmp_path: Path) -> None:
    target = FakeTarget()
    artifact = target.convert(None, Options(), tmp_path, batch=batch)
    report = verify_artifact(target, artifact, GOLDEN, EVALUATION, TOLERANCE)
    assert report.verdict is Verdict.PASS, report.reason
    assert set(target.sessions[0].batches) == {batch}
    target.damage = reversed_scores
    report = verify_artifact(target, artifact, GOLDEN, EVALUATION, TOLERANCE)
    assert report.verdict is Verdict.FAIL


def test_dynamic_batch_runs_in_chunks(tmp_path: Path) -> None:
    target = FakeTarget()
    verify(target, tmp_path)
    assert target.sessions[0].batches[-2:] == [32, 8]


def test_changed_file_fails_by_hash_and_is_not_run(tmp_path: Path) -> None:
    target = FakeTarget()
    artifact = target.convert(None, Options(), tmp_path)
    artifact.path.write_bytes(artifact.path.read_bytes() + b"\0")
    report = verify_artifact(target, artifact, GOLDEN, EVALUATION, TOLERANCE)
    assert report.verdict is Verdict.FAIL and "sha256" in str(report.reason)
    assert not target.sessions
    report = verify_artifact(target, artifact, GOLDEN, EVALUATION, TOLERANCE, check_hash=False)
    assert report.verdict is Verdict.PASS


def test_missing_file_fails(tmp_path: Path) -> None:
    target = FakeTarget()
    artifact = target.convert(None, Options(), tmp_path)
    artifact.path.unlink()
    for check_hash in (True, False):
        report = verify_artifact(
            target, artifact, GOLDEN, EVALUATION, TOLERANCE, check_hash=check_hash
        )
        assert report.verdict is Verdict.FAIL and "missing" in str(report.reason)


def test_no_runtime_is_not_run_with_reason_and_fix(tmp_path: Path) -> None:
    report = verify(unavailable(), tmp_path)
    assert report.verdict is Verdict.NOT_RUN
    assert "no GPU" in str(report.reason) and report.fix == "add a GPU"
    assert report.cases == () and report.max_abs is None


@pytest.mark.parametrize("error", [RuntimeError("bad\nfile"), InputError("is no model.")])
def test_a_file_that_cannot_be_loaded_fails(error: Exception, tmp_path: Path) -> None:
    report = verify(FakeTarget(load_error=error), tmp_path)
    assert report.verdict is Verdict.FAIL and "cannot load" in str(report.reason)
    assert "\n" not in str(report.reason)


def test_runtime_that_raises_midway_fails_with_its_words(tmp_path: Path) -> None:
    calls = iter(range(100))

    def breaks(result: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if next(calls) == 3:
            raise RuntimeError("invoke failed")
        return result

    report = verify(FakeTarget(damage=breaks), tmp_path)
    assert report.verdict is Verdict.FAIL and "invoke failed" in report.problems[0]
    assert "zeros" in report.problems[0] and 0 < len(report.cases) < len(report.expected)


def test_expected_set_is_matched_exactly_once(tmp_path: Path) -> None:
    report = verify(FakeTarget(), tmp_path)
    first = report.cases[0]
    assert replace(report, cases=report.cases[1:]).verdict is Verdict.FAIL
    assert replace(report, cases=(*report.cases, first)).verdict is Verdict.FAIL
    twice = replace(report, cases=(first, first, *report.cases[2:]))
    assert twice.verdict is Verdict.FAIL
    assert replace(report, expected=report.expected[1:]).verdict is Verdict.FAIL
    assert replace(report, expected=(*report.expected, report.expected[0])).verdict is Verdict.FAIL
    empty = replace(report, expected=(), cases=())
    assert empty.verdict is Verdict.FAIL and "no case" in str(empty.reason)


def test_accuracy_limits_bind(tmp_path: Path) -> None:
    report = verify(FakeTarget(), tmp_path)
    assert report.accuracy is not None
    worse = replace(report.accuracy, correct=report.accuracy.correct - 1, lost=1)
    assert "accuracy drops 2.50 points" in str(replace(report, accuracy=worse).reason)
    fewer = replace(report.accuracy, samples=39)
    assert replace(report, accuracy=fewer).verdict is Verdict.FAIL
    other = replace(report.accuracy, agreement=39)
    assert replace(report, accuracy=other).verdict is Verdict.FAIL
    assert "no evaluation set" in str(replace(report, accuracy=None).reason)


def test_small_flips_are_found_by_top1(tmp_path: Path) -> None:
    """An error within max_rel that changes predictions is still a failure."""
    loose = Tolerance(max_rel=1.0, reason="test", min_top1_agreement=1.0)
    target = FakeTarget(damage=reversed_scores)
    artifact = target.convert(None, Options(), tmp_path)
    tiny = {c: {k: v * 0.5 for k, v in o.items()} for c, o in GOLDEN.expected.items()}
    report = verify_artifact(target, artifact, replace(GOLDEN, expected=tiny), None, loose)
    assert any("top-1" in p for p in report.problems)


def test_golden_that_a_constant_could_match_is_no_evidence(tmp_path: Path) -> None:
    same = {k: v[:1] for k, v in GOLDEN.expected["random-0"].items()}
    singles = {c: f for c, f in GOLDEN.cases.items() if not c.startswith("batch")}
    blind = Golden(singles, dict.fromkeys(singles, same), "0" * 64)
    target = FakeTarget(damage=lambda r: {k: v.astype(np.float32) for k, v in same.items()})
    artifact = target.convert(None, Options(), tmp_path)
    limits = Tolerance(max_rel=1e-5, reason="test")
    report = verify_artifact(target, artifact, blind, None, limits)
    assert report.verdict is Verdict.FAIL and "constant" in str(report.reason)


def test_stale_expectations_fail_by_numbers(tmp_path: Path) -> None:
    other = weights()
    other["b"] += 0.1
    target = FakeTarget(parameters=other)  # retrained weights, golden of the old ones
    report = verify(target, tmp_path, check_hash=False)
    assert report.verdict is Verdict.FAIL


def test_verdict_over_all_targets(tmp_path: Path) -> None:
    good, bad = verify(FakeTarget(), tmp_path), verify(DAMAGES["constant"], tmp_path)
    absent = verify(unavailable(), tmp_path)
    assert verdict_of({"a": good, "b": absent}) is Verdict.PASS
    assert verdict_of({"a": good, "b": absent}, ["b"]) is Verdict.FAIL
    assert verdict_of({"a": good}, ["never-asked"]) is Verdict.FAIL
    assert verdict_of({"a": good, "b": bad}) is Verdict.FAIL
    assert verdict_of({"b": absent}) is Verdict.NOT_RUN
    assert verdict_of({}) is Verdict.NOT_RUN


def test_batches_that_differ_are_refused(tmp_path: Path) -> None:
    target = FakeTarget()
    session = target.load(target.convert(None, Options(), tmp_path))
    feeds = dict(GOLDEN.cases["batch-3"])
    with pytest.raises(InputError, match="samples"):
        run_batched(session, {**feeds, "x": feeds["x"][:2]})
    with pytest.raises(InputError, match="samples"):
        run_batched(session, {k: v[:0] for k, v in feeds.items()})


def test_outputs_of_a_batch_are_in_order(tmp_path: Path) -> None:
    target = FakeTarget()
    data = EVALUATION.dataset.inputs
    whole = run_batched(target.load(target.convert(None, Options(), tmp_path)), data)
    for batch in (1, 3, 64):
        session = target.load(target.convert(None, Options(), tmp_path, batch=batch))
        piecewise = run_batched(session, data)
        assert piecewise["logits"].shape == (40, CLASSES)
        np.testing.assert_allclose(piecewise["logits"], whole["logits"], rtol=1e-5, atol=1e-6)
