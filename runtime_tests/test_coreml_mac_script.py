"""verify_on_mac.py, run in a process of its own with a fake coremltools, and its report merged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_coremltools import write_fake, write_steps
from mutants import shared_bundle
from once import session_folder

import flowexport
from flowexport import parity
from flowexport.core.hashing import sha256_tree
from flowexport.core.types import Verdict
from flowexport.devices import merge_reports, read_device_report
from flowexport.targets.coreml import verify_on_mac

pytest.importorskip("coremltools", reason="needs flowexport[coreml]")

MODEL = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 4, 4, stride=4)
        self.head = nn.Linear(4, 10)

    def forward(self, image):
        return self.head(self.conv(image).relu().mean((2, 3)))

def build():
    return Small()
"""
RECIPE = """schema: flowexport.recipe/1
name: small
model: small_model.py:build
inputs: {image: batchx1x32x32}
outputs: [logits]
labels: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
preprocessing: {range: [0.0, 1.0], mean: [0.25], std: [0.5]}
targets:
  coreml: {classifier: true, image: true}
evaluation: {dataset: digits-test, limit: 20}
bench: {warmup: 1, min_runs: 12, min_seconds: 0}
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mac")
    (folder / "small_model.py").write_text(MODEL)
    (folder / "small.yaml").write_text(RECIPE)
    result = flowexport.convert(folder / "small.yaml", out=folder / "bundle", bench=False)
    assert result.verdict is Verdict.PASS
    return result.bundle


def run(
    bundle: Path,
    folder: Path,
    *arguments: str,
    mac: bool = True,
    mode: str = "",
    steps: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the bundle's own script as a user would, flowexport out of its sight."""
    fake = write_fake(folder / "fake")
    environment = {**os.environ, "PYTHONPATH": str(fake), "FAKE_MODE": mode}
    environment |= {} if steps is None else {"FAKE_STEPS": str(steps)}
    environment |= {"FAKE_MAC": "1"} if mac else {}
    return subprocess.run(
        [sys.executable, str(bundle / "coreml" / "verify_on_mac.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_report_of_every_unit_merges(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_device_report(tmp_path / "device_report.json")
    assert [r["backend"]["requested"] for r in report["runs"]] == list(verify_on_mac.UNITS)
    assert all(len(r["latency"]["inference_ms"]) == 12 and not r["errors"] for r in report["runs"])
    plan = json.loads(report["environment"]["compute_plan.forward.all"])
    assert plan["devices"] == {"CPU": 1, "Neural Engine": 3}
    assert plan["elsewhere"] == {"ios16.classify on CPU": 1}
    merged = merge_reports([tmp_path / "device_report.json"], tmp_path / "merged", bundles=[bundle])
    assert merged.verdict is Verdict.PASS and len(merged.rows) == 4
    row = merged.rows[0]
    assert row.accuracy.result is not None and row.accuracy.result.samples == 20
    assert row.key["backend"] == "cpu_only (plan: CPU 1, Neural Engine 3)"
    assert row.key["client"] == "desktop" and row.facts["os"]["name"] == "macOS"
    # Beside the bundle's own interpreted row, which is of the same file.
    both = merge_reports([tmp_path / "device_report.json", bundle], tmp_path / "both")
    assert {r.key["backend"] for r in both.rows} > {"coreml-interpreter"}


def test_wrong_numbers_fail_in_the_merge(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, tmp_path, "--units", "all", mode="wrong")
    assert done.returncode == 0, done.stderr
    merged = merge_reports([tmp_path / "device_report.json"], tmp_path / "m", bundles=[bundle])
    assert merged.verdict is Verdict.FAIL
    assert "max_rel" in merged.rows[0].problems[0]


@pytest.mark.parametrize(
    ("mode", "stage", "message"),
    [
        ("load", "load", "RuntimeError: Error compiling model: no such unit"),
        ("predict", "evaluation", "RuntimeError: Unable to compute the prediction"),
    ],
)
def test_a_unit_that_raises_is_a_finding(
    mode: str, stage: str, message: str, bundle: Path, tmp_path: Path
) -> None:
    done = run(bundle, tmp_path, "--units", "cpu_only", "cpu_and_ne", mode=mode)
    assert done.returncode == 0, done.stderr
    runs = read_device_report(tmp_path / "device_report.json")["runs"]
    assert {"stage": stage, "message": message} in runs[1]["errors"]
    assert bool(runs[0]["errors"]) == (mode == "predict")
    merged = merge_reports([tmp_path / "device_report.json"], tmp_path / "m", bundles=[bundle])
    assert merged.rows[1].verdict is Verdict.FAIL


def test_no_plan_is_no_failure(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, tmp_path, "--units", "cpu_only", "all", "--runs", "11", mode="noplan")
    assert done.returncode == 0, done.stderr
    report = read_device_report(tmp_path / "device_report.json")
    assert report["environment"]["compute_plan.forward.all"].endswith("needs macOS 14.4")
    # CPU_ONLY is what it says; what "all" became nobody knows.
    assert [r["backend"]["effective"] for r in report["runs"]] == ["cpu_only", None]
    assert len(report["runs"][0]["latency"]["inference_ms"]) == 11


# A causal model: two functions of one package, and a state between steps.


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a causal model's bundle, and what its step gives."""
    bundle = shared_bundle(session_folder(tmp_path_factory), "stream")
    table = tmp_path_factory.mktemp("steps") / "steps.npz"
    write_steps(bundle, table)
    return bundle, table


@pytest.mark.slow
def test_steps_run_from_the_reset_state_and_merge(
    stream: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, table = stream
    done = run(bundle, tmp_path, "--units", "cpu_only", "all", steps=table)
    assert done.returncode == 0, done.stderr
    report = read_device_report(tmp_path / "device_report.json")
    told = [(r.get("entry"), r["backend"]["requested"]) for r in report["runs"]]
    assert told == [(e, u) for e in (None, "step") for u in ("cpu_only", "all")]
    assert not any(r["errors"] for r in report["runs"])
    cases = parity.read_golden(bundle / "golden").expected
    for one in report["runs"]:
        assert {g["name"] for g in one["golden"]} == set(cases)
        assert all(g["error"] is None for g in one["golden"])
        # A step's results are stacked to those of a forward; its next state is not told.
        shapes = {g["name"]: [(o["name"], o["shape"]) for o in g["outputs"]] for g in one["golden"]}
        assert shapes == {c: [("logits", list(v["logits"].shape))] for c, v in cases.items()}
    assert {"compute_plan.forward.all", "compute_plan.step.all"} <= set(report["environment"])
    merged = merge_reports([tmp_path / "device_report.json"], tmp_path / "merged", bundles=[bundle])
    assert merged.verdict is Verdict.PASS and len(merged.rows) == 4
    assert {r.key["format"] for r in merged.rows} == {"coreml", "coreml step"}


@pytest.mark.slow
def test_wrong_steps_fail_in_the_merge(stream: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, table = stream
    done = run(bundle, tmp_path, "--units", "all", mode="wrong", steps=table)
    assert done.returncode == 0, done.stderr
    merged = merge_reports([tmp_path / "device_report.json"], tmp_path / "m", bundles=[bundle])
    assert [r.verdict for r in merged.rows] == [Verdict.FAIL, Verdict.FAIL]
    assert all("max_rel" in r.problems[0] for r in merged.rows)


def test_a_causal_answer_is_that_after_the_last_real_step() -> None:
    class Steps(verify_on_mac.Runner):
        def __init__(self) -> None:
            self.following = {"state": "next"}

        def run(self, arrays: dict[str, Any]) -> dict[str, Any]:
            return {"logits": arrays["x"]}

    x = np.zeros((2, 4, 3), np.float32)
    x[0, 1, 2] = x[0, 3, 0] = x[1, 3, 1] = 1
    evaluation = {"inputs": {"x": x}, "output": "logits", "lengths": np.array([2, 4])}
    assert verify_on_mac.predictions(Steps(), evaluation) == [2, 1]
    assert verify_on_mac.predictions(Steps(), {**evaluation, "inputs": {"x": x + np.nan}}) == [
        None,
        None,
    ]


def test_elsewhere_it_says_so(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, tmp_path, mac=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "Core ML runs on macOS only" in done.stderr and "Traceback" not in done.stderr


def damage(bundle: Path, what: str) -> None:
    manifest = bundle / "manifest.json"
    package = next((bundle / "coreml").glob("*.mlpackage"))
    if what == "weights":
        file = package / "Data/com.apple.CoreML/weights/weight.bin"
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(bytes(data))
    elif what == "package":
        shutil.rmtree(package)
    elif what == "golden":
        (bundle / "golden/cases.safetensors").unlink()
    elif what == "golden bytes":
        file = bundle / "golden/cases.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "manifest":
        manifest.unlink()
    elif what == "json":
        manifest.write_text("{")
    else:
        document: dict[str, Any] = json.loads(manifest.read_text())
        if what == "schema":
            document["schema"] = "other/1"
        else:
            document["targets"] = {"onnx": {}}
        manifest.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("weights", 4, "the package .* has sha256"),
        ("package", 2, r"\.mlpackage is missing"),
        ("golden", 2, r"cases\.safetensors is missing"),
        ("golden bytes", 4, "the file .* has sha256"),
        ("manifest", 2, r"manifest\.json cannot be read"),
        ("json", 2, r"manifest\.json is no JSON"),
        ("schema", 2, "schema 'other/1'; expected 'flowexport.manifest/1'"),
        ("target", 2, "has no Core ML package; it has onnx"),
    ],
)
def test_damaged_bundles_are_refused_before_anything_runs(
    what: str, code: int, message: str, bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    damage(copy, what)
    done = run(copy, tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "device_report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs is 0; expected 1 or more"),
        (["--units", "npu"], "invalid choice: 'npu'"),
        (["--bundle", "nowhere"], "manifest.json cannot be read"),
        (["--out", "taken.json"], "taken.json exists; expected a new file"),
    ],
)
def test_unusable_arguments_are_refused(
    arguments: list[str], message: str, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken.json").write_text("{}")
    done = run(bundle, tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert (tmp_path / "taken.json").read_text() == "{}"


def test_it_hashes_as_flowexport_does(bundle: Path) -> None:
    package = next((bundle / "coreml").glob("*.mlpackage"))
    assert verify_on_mac.sha256_tree(package) == sha256_tree(package)
    listed = json.loads((bundle / "manifest.json").read_text())["files"]
    assert "coreml/verify_on_mac.py" in listed


def test_it_imports_nothing_but_the_standard_library_and_coremltools() -> None:
    import ast

    tree = ast.parse(Path(verify_on_mac.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    # numpy comes with coremltools; Pillow it asks for itself where an input is an image.
    assert roots == {"coremltools", "numpy", "PIL"}
