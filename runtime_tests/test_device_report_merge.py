"""flowexport report merge: everything from raw data, nothing absurd counted as success."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from device_tools import (
    Report,
    device_report,
    first,
    merger,
    one_wrong,
    save,
    set_times,
    shifted,
    write_bundle,
)
from way_tools import names, refused

from flowexport.bundle import write_json
from flowexport.core.errors import BundleError, InputError, OutputError, VerificationError
from flowexport.core.types import Verdict
from flowexport.devices import MergeResult, merge_reports, read_device_report
from flowexport.devices.merge import FILES
from flowexport.devices.reading import decode, encode
from flowexport.package import Package, make_package
from flowexport.report import validate


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def package(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    out = tmp_path_factory.mktemp("package") / "package"
    return Package.open(make_package([bundle], out).path)


@pytest.fixture
def report(package: Package) -> Report:
    return device_report(package)


@pytest.fixture
def merged(package: Package, tmp_path: Path) -> Callable[..., MergeResult]:
    return merger(package, tmp_path)


def test_a_sound_report_passes(report: Report, merged: Callable[..., MergeResult]) -> None:
    validate(report, "device_report")
    result = merged(report)
    assert result.verdict is Verdict.PASS and names(result.path) == set(FILES)
    validate(json.loads((result.path / "merge.json").read_text()), "merge")
    for row, given in zip(result.rows, report["runs"], strict=True):
        assert row.verdict is Verdict.PASS and row.problems == [] and row.gaps == []
        assert row.agreement.evidence == "outputs" and 0 < row.agreement.worst("max_rel") < 1e-6
        found = row.to_json()
        times = given["latency"]["inference_ms"]
        assert found["latency"]["statistics"]["latency_ms_p50"] == np.median(times)
        assert found["latency"]["statistics"]["latency_ms_min"] == min(times)
        assert found["accuracy"]["correct"] == 36 and found["accuracy"]["samples"] == 40
        assert found["preprocessing"]["max_abs"] == 0.0 and found["preprocessing"]["compared"] == 3
        assert found["facts"]["memory"]["peak_bytes"] is None, "missing is null, never zero"


def drop_case(run: Report) -> None:
    run["golden"].pop()


def repeat_case(run: Report) -> None:
    run["golden"].append(run["golden"][0])


def strange_case(run: Report) -> None:
    run["golden"].append({**run["golden"][0], "name": "mine"})


def failed_case(run: Report) -> None:
    run["golden"][2].update(outputs=[], error="out of memory")


def not_finite(run: Report) -> None:
    shifted(run, float("nan"))


def cut_tensor(run: Report) -> None:
    tensor = run["golden"][0]["outputs"][0]
    tensor["data"] = tensor["data"][:-8]


def reshaped(run: Report) -> None:
    tensor = run["golden"][0]["outputs"][0]
    tensor["shape"] = tensor["shape"][::-1]


def other_dtype(run: Report) -> None:
    value = decode(run["golden"][0]["outputs"][0])
    assert isinstance(value, np.ndarray)
    run["golden"][0]["outputs"][0] = encode("logits", value.astype(np.float64))


def wrong_predictions(run: Report) -> None:
    run["evaluation"]["predictions"] = [(p + 1) % 4 for p in run["evaluation"]["predictions"]]


def no_class(run: Report) -> None:
    run["evaluation"]["predictions"][3] = 4


def missing_prediction(run: Report) -> None:
    run["evaluation"]["predictions"][3] = None


def fewer_predictions(run: Report) -> None:
    run["evaluation"]["predictions"].pop()


def wrong_input(run: Report) -> None:
    tensor = run["preprocessing"][0]["inputs"][0]
    value = decode(tensor)
    assert isinstance(value, np.ndarray)
    run["preprocessing"][0]["inputs"][0] = encode(tensor["name"], value + np.float32(1e-3))


def unchecked_input(run: Report) -> None:
    run["preprocessing"].pop()


def load_error(run: Report) -> None:
    run["errors"].append({"stage": "load", "message": "no SIMD"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: shifted(r, 1e-3), "max_rel"),
        (drop_case, "compared 0 times; expected once"),
        (repeat_case, "compared 2 times; expected once"),
        (strange_case, "not expected"),
        (failed_case, "out of memory"),
        (not_finite, "not finite"),
        (cut_tensor, "bytes; expected"),
        (reshaped, "has shape"),
        (other_dtype, "dtype float64"),
        (wrong_predictions, "accuracy drops"),
        (one_wrong, "accuracy"),
        (no_class, "no class"),
        (missing_prediction, "1 of 40 samples have no prediction"),
        (fewer_predictions, "39 samples were predicted; expected 40"),
        (wrong_input, "differs by 0.001"),
        (unchecked_input, "checked 0 times"),
        (load_error, "load: no SIMD"),
        (lambda r: set_times(r, [1.0] * 20 + [-1.0]), "1 of 21 samples are negative"),
        (lambda r: set_times(r, [1.0] * 20 + [None]), "1 of 21 samples are missing"),
        (lambda r: set_times(r, [1.0] * 20 + [0]), "are 0: the clock is too coarse"),
        (lambda r: set_times(r, [1.0] * 20 + [1e9]), "above one hour"),
        (lambda r: r["latency"].update(duration_ms=3.0), "add up to"),
        (lambda r: r["latency"]["pre_ms"].pop(), "pre_ms has 39 samples; expected 40"),
    ],
)
def test_what_is_wrong_fails(
    report: Report,
    merged: Callable[..., MergeResult],
    damage: Callable[[Report], None],
    words: str,
) -> None:
    damage(first(report))
    result = merged(report)
    bad, good = result.rows
    assert result.verdict is Verdict.FAIL and bad.verdict is Verdict.FAIL
    assert words in "\n".join(bad.problems)
    assert good.verdict is Verdict.PASS, "the other run is judged by itself"
    assert words.split(";")[0] in (result.path / "comparison.html").read_text().replace(
        "&#39;", "'"
    )
    if bad.latency.problems:
        statistics = bad.to_json()["latency"]["statistics"]
        assert set(statistics.values()) == {None}, "absurd samples have no statistics"


@pytest.mark.parametrize(
    ("part", "gap", "verdict"),
    [
        ("golden", "outputs: the golden cases were not run", Verdict.NOT_RUN),
        ("evaluation", "accuracy: the evaluation set was not run", Verdict.NOT_RUN),
        ("preprocessing", "preprocessing: the preprocessing was not checked", Verdict.PASS),
        ("latency", "latency: not measured", Verdict.PASS),
    ],
)
def test_what_is_missing_is_told(
    report: Report,
    merged: Callable[..., MergeResult],
    part: str,
    gap: str,
    verdict: Verdict,
) -> None:
    first(report)[part] = None
    row = merged(report).rows[0]
    assert row.verdict is verdict and row.gaps == [gap]


def test_few_runs_are_told(report: Report, merged: Callable[..., MergeResult]) -> None:
    set_times(first(report), [1.0, 2.0, 3.0])
    row = merged(report).rows[0]
    assert row.latency.verdict is Verdict.NOT_RUN and "3 runs" in row.gaps[0]
    set_times(first(report), [])
    assert "0 runs" in merged(report).rows[0].gaps[0]


def test_a_wrong_hash_is_refused(report: Report, merged: Callable[..., MergeResult]) -> None:
    first(report)["model_sha256"] = "a" * 64
    with pytest.raises(VerificationError, match="aaaaaaaaaaaa"):
        merged(report)


def test_an_unknown_hash_is_no_success(report: Report, merged: Callable[..., MergeResult]) -> None:
    first(report)["model_sha256"] = None
    assert "sha256 is missing" in merged(report).rows[0].problems[0]


def test_without_reference_nothing_passes(
    report: Report, package: Package, merged: Callable[..., MergeResult]
) -> None:
    result = merged(report, packages=[])
    assert result.verdict is Verdict.NOT_RUN
    assert "--package" in result.rows[0].gaps[0]
    other = device_report(package, label="another")
    first(other)["model_sha256"] = "b" * 64
    with pytest.raises(VerificationError, match=r"report-1\.json"):
        merged(report, other, packages=[])


def test_summaries_are_not_read(report: Report) -> None:
    """A report has no place for a verdict; one that brings its own is refused."""
    for change in ({"verdict": "PASS"}, {"latency_ms_p50": 0.1}):
        with pytest.raises(BundleError, match="Additional properties"):
            validate({**report, "runs": [{**first(report), **change}]}, "device_report")


def test_bad_files_are_refused(
    report: Report, package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def merge(text: str, *words: str, code: int = 2) -> None:
        file = tmp_path / "r.json"
        file.write_text(text)
        out = tmp_path / "out"
        refused(
            capsys, code, *words,
            arguments=["report", "merge", file, "--out", out, "--package", package.path],
        )  # fmt: skip
        assert not out.exists()

    merge("{", "is no JSON")
    merge("[]", "no JSON object")
    merge("{}", "schema is None")
    merge(json.dumps({**report, "schema": "flowexport.report/2"}), "flowexport.report/2")
    merge(json.dumps(package.manifest), "flowexport.package/1")
    merge(json.dumps({**report, "runs": []}), "0 runs")
    merge(json.dumps({**report, "device": {"label": "x"}}), "device does not follow")
    text = json.dumps(report).replace('"cold_ms": 12.5', '"cold_ms": NaN')
    merge(text, "NaN is no JSON number")
    strange = copy.deepcopy(report)
    strange["runs"][0]["model"] = "mine"
    merge(json.dumps(strange), "mine onnx", "fakes onnx")
    wrong = copy.deepcopy(report)
    wrong["runs"][0]["model_sha256"] = "c" * 64
    merge(json.dumps(wrong), "cccccccccccc", code=4)
    refused(capsys, 2, "does not exist", arguments=["report", "merge", "/no.json", "--out", "x"])


def test_one_report_counts_once(report: Report, tmp_path: Path, package: Package) -> None:
    files = [save(tmp_path / n, report) for n in ("a.json", "b.json")]
    with pytest.raises(InputError, match="expected each report once"):
        merge_reports(files, tmp_path / "out", packages=[package.path])


def test_bundles_are_desktop_rows_and_references(
    bundle: Path, report: Report, tmp_path: Path
) -> None:
    file = save(tmp_path / "r.json", report)
    by_folder = merge_reports([file, bundle], tmp_path / "a")
    by_file = merge_reports([file, bundle / "report.json"], tmp_path / "b")
    for result in (by_folder, by_file):
        assert result.verdict is Verdict.PASS and len(result.rows) == 5
        desktop = [r for r in result.rows if r.key["client"] == "desktop"]
        assert [r.key["format"] for r in desktop] == ["onnx", "tflite", "tensorrt"]
        assert all(r.agreement.evidence == "bundle" for r in desktop)
        saved = json.loads((bundle / "report.json").read_text())["targets"]["onnx"]["latency"]
        assert desktop[0].latency.usable == saved["samples_ms"]
    other = merge_reports([file], tmp_path / "c", bundles=[bundle])
    assert other.verdict is Verdict.PASS and len(other.rows) == 2


def test_an_edited_bundle_report_changes_no_verdict(
    report: Report, package: Package, tmp_path: Path
) -> None:
    bad = write_bundle(tmp_path, damaged="tensorrt")
    edited = json.loads((bad / "report.json").read_text())
    edited["verdict"] = edited["targets"]["tensorrt"]["verdict"] = "PASS"
    edited["targets"]["tensorrt"]["parity"].update(verdict="PASS", problems=[], reason=None)
    write_json(bad / "report.json", edited)
    result = merge_reports([bad], tmp_path / "out")
    assert [r.verdict.value for r in result.rows] == ["PASS", "PASS", "FAIL"]
    edited["targets"]["onnx"]["latency"]["samples_ms"][0] = -1
    write_json(bad / "report.json", edited)
    with pytest.raises(BundleError, match=r"onnx\.latency"):
        merge_reports([bad], tmp_path / "out", force=True)


def test_what_a_report_says_is_no_markup(
    package: Package, merged: Callable[..., MergeResult]
) -> None:
    evil = "=cmd|'/c calc'!A1 <script>alert(1)</script> | [bold]x"
    result = merged(device_report(package, label=evil))
    page = (result.path / "comparison.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    table = (result.path / "comparison.md").read_text()
    assert "<script" not in table and "\\|" in table
    cells = list(csv.DictReader((result.path / "comparison.csv").open(newline="")))
    assert cells[0]["device"].startswith("'=cmd") and cells[0]["peak_memory_bytes"] == ""
    assert float(cells[0]["p50_ms"]) == result.rows[0].latency.statistics()["latency_ms_p50"]


def test_force_replaces_comparisons_only(report: Report, package: Package, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years of work")
    file = save(tmp_path / "r.json", report)
    with pytest.raises(OutputError, match="is no comparison"):
        merge_reports([file], mine, packages=[package.path], force=True)
    assert names(mine) == {"thesis.txt"}


def test_tensors_survive_the_way() -> None:
    values = np.array([[1.5, float("nan")], [float("inf"), -0.0]], np.float32)
    back = decode(encode("x", values))
    assert isinstance(back, np.ndarray) and back.tobytes() == values.tobytes()
    for wrong in ({"data": "AAA="}, {"data": "!!!!"}, {"dtype": "object"}, {"dtype": "fancy"}):
        assert isinstance(decode({**encode("x", values), **wrong}), str)


def test_reading_checks_the_schema(report: Report, tmp_path: Path) -> None:
    assert read_device_report(save(tmp_path / "r.json", report)) == report
    report["runs"][0]["latency"]["inference_ms"] = "fast"
    with pytest.raises(BundleError, match="inference_ms"):
        read_device_report(save(tmp_path / "r.json", report))
