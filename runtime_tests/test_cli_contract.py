"""The command line's contract: verbs, JSON keys, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from once import session_folder
from way_tools import finished_bundle, names, refused, start, write_model, write_plugin

import flowexport
from flowexport.bundle import Bundle
from flowexport.cli import run
from flowexport.cli.console import complete_recipe, complete_target
from flowexport.core.hashing import sha256_file
from flowexport.report import validate

HEAVY = (
    "torch", "onnx", "onnxruntime", "coremltools", "litert_torch", "tensorrt_rtx",
    "jsonschema", "flowexport.pipeline", "flowexport_models",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A bundle, what ``convert --json`` printed and what it said on stderr."""
    path, out, err = finished_bundle(session_folder(tmp_path_factory))
    return path, json.loads(out), err


@pytest.fixture
def bundle(made: tuple[Path, dict[str, Any], str], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made[0], tmp_path / "bundle"))


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """Run a ``--json`` command line; its stdout must be one JSON document."""
    assert run([str(a) for a in (*arguments, "--json")]) == code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_convert_leaves_a_whole_bundle(made: tuple[Path, dict[str, Any], str]) -> None:
    path, printed, stderr = made
    assert names(path.parent) == {"tiny"}, "no lock and no half folder beside it"
    assert names(path) == {"manifest.json", "onnx", "golden", "logs", "report.json", "report.html"}
    manifest = json.loads((path / "manifest.json").read_text())
    validate(manifest, "manifest")
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_file(path / name)
    onnx = manifest["targets"]["onnx"]
    assert onnx["precision"] == "fp32" and onnx["fusions"] == {"FlowAttention": 1}
    assert onnx["conversion"]["seconds"] > 0 and onnx["conversion"]["peak_rss_bytes"] > 1 << 20
    assert onnx["recipe_sha256"] == manifest["recipe_sha256"] == printed["recipe_sha256"]
    assert onnx["deterministic"]["deterministic"] in (True, False, None)
    assert str(path.parent) not in json.dumps(manifest), "no path of this machine"
    assert printed["verdict"] == "PASS" and printed["bundle"] == str(path)
    assert printed["targets"]["onnx"]["sha256"] == onnx["sha256"]
    assert printed["targets"]["onnx"]["latency"]["iterations"] >= 3
    assert stderr == "", "nothing is said without a terminal"


def test_verify_keys(
    made: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = Bundle.open(made[0]).manifest
    document = call(capsys, "verify", made[0], "--target", "onnx", "--require", "onnx")
    assert document["verdict"] == "PASS"
    found = document["targets"]["onnx"]
    assert found["verdict"] == "PASS" and found["runtime"].startswith("onnxruntime ")
    assert 0 < found["max_abs"] < 1e-5 and found["cosine"] > 0.99999 and found["sqnr_db"] > 80
    assert found["top1_agreement"] == 1.0
    assert found["accuracy"] is None and found["reason"] is None
    assert Bundle.open(made[0]).manifest == before, "a check changes nothing"


def test_bench_keys(
    made: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = call(capsys, "bench", made[0], "--threads", "2")["targets"]["onnx"]
    assert 0 < found["latency_ms_p50"] <= found["latency_ms_p90"] <= found["latency_ms_p99"]
    assert found["threads"] == 2 and found["iterations"] >= 3


def test_save_writes_the_findings_into_the_report(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads((bundle / "report.json").read_text())
    call(capsys, "bench", bundle, "--save")
    new = json.loads((bundle / "report.json").read_text())
    assert new["targets"]["onnx"]["latency"] != old["targets"]["onnx"]["latency"]
    assert new["targets"]["onnx"]["parity"] == old["targets"]["onnx"]["parity"]
    for name, entry in Bundle.open(bundle).manifest["files"].items():
        assert entry["sha256"] == sha256_file(bundle / name)
    assert call(capsys, "verify", bundle)["verdict"] == "PASS"


def test_report_is_written_anew(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "report.html").unlink()
    document = call(capsys, "report", bundle)
    assert document["report"] == str(bundle / "report.html")
    assert "<html" in (bundle / "report.html").read_text()


def test_inspect_reads_bundle_and_file(
    made: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    document = call(capsys, "inspect", made[0])
    entry = document["targets"]["onnx"]
    assert entry["fusions"] == {"FlowAttention": 1} and entry["operators"]
    assert [s["name"] for s in entry["inputs"]] == ["x"]
    alone = call(capsys, "inspect", entry["path"])
    assert alone["target"] == "onnx" and alone["size_bytes"] == entry["size_bytes"]


def test_without_json_there_is_a_table(
    made: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, word in (("verify", "PASS"), ("bench", "onnxruntime"), ("inspect", "FlowAttention")):
        assert run([verb, str(made[0])]) == 0
        captured = capsys.readouterr()
        assert word in captured.out and captured.err == ""


def test_list_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    listed = call(capsys, "list")
    assert {"japanese-vowels", "digits"} <= {r["name"] for r in listed["recipes"]}
    assert "flowformer-vision-224" in {m["name"] for m in listed["models"]}
    assert "onnx" in {t["name"] for t in listed["targets"]}
    told = call(capsys, "doctor")
    for entry in told["runners"].values():
        assert (entry["available"] and entry["ready"]) or (entry["reason"] and entry["fix"])
    assert set(told["runners"]) == {"qemu-aarch64", "tflite-2.14"}
    targets = told["targets"]
    assert targets["onnx"]["converts"] and targets["onnx"]["runs"]
    for entry in targets.values():
        assert entry["converts"] or (entry["reason"] and entry["fix"])
        assert entry["runs"] or entry["reason"]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_model(tmp_path)
    before = names(tmp_path)
    document = call(capsys, "convert", recipe, "--dry-run", "--out", tmp_path / "deep" / "out")
    assert list(document["targets"]) == ["onnx"] and document["parameters"] == 8 * 24 + 24 + 27
    assert document["targets"]["onnx"]["precision"] == "fp32"
    assert run(["convert", str(recipe), "--dry-run"]) == 0
    assert "onnx" in capsys.readouterr().out
    assert names(tmp_path) == before


def test_a_file_of_ones_own_needs_no_recipe(tmp_path: Path) -> None:
    write_model(tmp_path)
    result = flowexport.convert(
        f"{tmp_path / 'tiny_model.py'}:build",
        inputs=[flowexport.TensorSpec("x", (1, 6, 8))],
        targets=["onnx"],
        out=tmp_path / "out",
        bench=False,
    )
    assert result.verdict == "PASS" and result.parity["onnx"].max_rel < 1e-5
    assert [s["name"] for s in result.manifest["outputs"]] == ["output"]
    again = flowexport.verify(tmp_path / "out")
    assert again.parity["onnx"].max_abs == result.parity["onnx"].max_abs
    assert flowexport.benchmark(tmp_path / "out").latency["onnx"].iterations >= 50


def test_converting_twice_gives_the_same_bytes(
    made: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    first = Bundle.open(made[0]).manifest
    result = flowexport.convert(
        write_model(tmp_path), out=tmp_path / "out", verify=False, bench=False
    )
    assert result.manifest["recipe_sha256"] == first["recipe_sha256"]
    assert result.verdict == "NOT_RUN" and "--no-verify" in str(result.parity["onnx"].reason)
    if first["targets"]["onnx"]["deterministic"]["deterministic"]:
        assert result.manifest["targets"]["onnx"]["sha256"] == first["targets"]["onnx"]["sha256"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flowexport.cli import run; code = run(['--help']); "
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]; "
        "print(heavy, file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in (
        "list",
        "doctor",
        "convert",
        "verify",
        "bench",
        "report",
        "inspect",
        "package",
        "demo",
    ):
        assert verb in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"flowexport {flowexport.__version__}"


def test_completion_offers_recipes_and_targets() -> None:
    assert "japanese-vowels" in complete_recipe("ja") and "digits" not in complete_recipe("ja")
    assert complete_target("on") == ["onnx"]


def test_usage_errors_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "--nope", arguments=["convert", "--nope"])
    refused(capsys, 2, "RECIPE_OR_MODEL", arguments=["convert"])
    refused(capsys, 2, "explode", arguments=["explode"])


def test_with_json_an_error_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "/nowhere/at/all", "--json"]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["exit_code"] == 2 and error["type"] == "BundleError"
    assert "/nowhere/at/all" in error["message"] and captured.err.startswith("error: ")


def test_outside_targets_are_found_and_a_broken_one_stops_nothing(tmp_path: Path) -> None:
    env: Mapping[str, str] = write_plugin(tmp_path)
    process = start("doctor", "--json", env=env)
    out, err = process.communicate()
    assert process.returncode == 0, err
    targets = json.loads(out)["targets"]
    assert targets["steady"]["converts"] and not targets["steady"]["runs"]
    assert "ModuleNotFoundError" in targets["broken"]["reason"]
    assert targets["broken"]["fix"] == "pip install --force-reinstall fake-targets"
    assert targets["onnx"]["converts"]


def test_not_run_is_shown_and_fails_only_where_required(tmp_path: Path) -> None:
    env = write_plugin(tmp_path)
    text = (
        write_model(tmp_path).read_text().replace("onnx: {}", "steady: {}\n  absent: {}\n  broken:")
    )
    recipe = write_model(tmp_path, text)
    out = tmp_path / "out"
    process = start("convert", recipe, "--out", out, "--json", "--require", "steady", env=env)
    stdout, err = process.communicate()
    assert process.returncode == 5, err
    assert err.startswith("error: require steady: NOT_RUN") and "Fix: pip install" in err
    printed = json.loads(stdout)["targets"]
    assert {n: t["verdict"] for n, t in printed.items()} == dict.fromkeys(
        ("steady", "absent", "broken"), "NOT_RUN"
    )
    assert "no runtime" in printed["absent"]["reason"] and printed["absent"]["fix"]
    assert "cannot be imported" in printed["broken"]["reason"]
    assert set(Bundle.open(out).manifest["not_run"]) == {"absent", "broken"}
    process = start("verify", out, "--json", env=env)
    stdout, err = process.communicate()
    assert process.returncode == 0 and err == ""
    assert json.loads(stdout)["verdict"] == "NOT_RUN"


def test_help_tells_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, default in (("convert", "[out/RECIPE]"), ("front", "[all]"), ("demo", "[8017]")):
        assert run([verb, "--help"]) == 0
        assert default in " ".join(capsys.readouterr().out.split())
