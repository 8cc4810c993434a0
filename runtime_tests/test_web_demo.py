"""The web demo in a real Chromium: what people do, and what it measures."""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from web_tools import ARTIFACTS, WEB, drive, need, serve

from flowexport.bundle import Bundle
from flowexport.cli import run
from flowexport.parity import read_evaluation
from flowexport.registry import TARGETS

pytest_plugins = ["web_fixtures"]
pytestmark = pytest.mark.slow

RECIPES = ("digits", "japanese-vowels", "japanese-vowels-streaming")
MAX_REL = 1e-5
FIRST_VISIT_BYTES = 9_000_000
MODELS = (".onnx", ".tflite")


@pytest.fixture(scope="session")
def tour(site: Path, package: Path, chromium: str) -> dict[str, Any]:
    with serve(site, package) as served:
        return drive("tour", served.url, chromium)


def the_report() -> dict[str, Any]:
    return dict(json.loads((ARTIFACTS / "web-report.json").read_text(encoding="utf-8")))


def settings_of(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """One-thread runs by (model, format); ``<format> step`` for the step-by-step form."""
    runs = [r for r in report["runs"] if r["threads"]["requested"] == 1]
    return {(r["model"], r["format"] + " step" * (r["entry"] == "step")): r for r in runs}


@pytest.fixture(scope="session")
def phone(site: Path, package: Path, chromium: str) -> dict[str, Any]:
    with serve(site, package) as served:
        return drive("phone", served.url, chromium)


def test_web_client_code_in_node(site: Path, package: Path) -> None:
    done = subprocess.run(
        [need("npm"), "test"],
        cwd=WEB,
        env={**os.environ, "FLOWEXPORT_PACKAGE": str(package)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "# skipped 0" in done.stdout
    assert "# pass 0" not in done.stdout


def test_web_ships_only_what_it_uses(site: Path) -> None:
    wasm = sorted(p.name for p in site.rglob("*.wasm"))
    assert len(wasm) == 5, wasm  # ORT wasm and WebGPU; LiteRT plain, compatible and threaded
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "<style" not in page
    assert " style=" not in page
    assert page.count("<script") == page.count('<script type="module" src=') == 1
    assert "http://" not in page
    assert "https://" not in page


def test_web_selftest_passes_on_both_backends(tour: dict[str, Any]) -> None:
    assert tour["state"] == "passed"
    found = {(f["model"], f["what"]): f for f in tour["findings"]}
    for model in RECIPES:
        steps = ("ort-wasm step", "litert-wasm step") * (model == "japanese-vowels-streaming")
        for what in ("preprocessing", "ort-wasm", "litert-wasm", *steps):
            finding = found[model, what]
            assert finding["verdict"] == "PASS", finding
            passed, total = map(int, finding["cases"].split("/"))
            assert passed == total > 0
        assert found[model, "ort-webgpu"]["verdict"] in ("NOT_RUN", "PASS")


def test_web_console_is_silent_and_no_request_leaves(tour: dict[str, Any]) -> None:
    assert tour["console"] == []
    assert tour["foreign"] == []
    assert tour["notices"] == []


def test_web_draws_digits(tour: dict[str, Any]) -> None:
    for digit, seen in tour["drawn"].items():
        assert seen["answer"] == digit
        assert seen["alert"] is None
        assert "ONNX Runtime Web" in seen["timing"]
    assert tour["byKeyboard"]["label"].endswith(tour["byKeyboard"]["answer"])
    assert tour["onLitert"]["answer"] == tour["byKeyboard"]["answer"]
    assert "LiteRT" in tour["onLitert"]["timing"]
    assert tour["tabByKey"] == ["tab-listen", True]


def test_web_replays_an_utterance(tour: dict[str, Any], package: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    series = [m for m in manifest["models"] if m["id"].startswith("japanese-vowels")]
    assert set(tour["heard"]) == {m["id"] for m in series}
    for model in series:
        heard = tour["heard"][model["id"]]
        raw = (package / model["evaluation"]["file"]["path"]).read_bytes()
        entry = model["evaluation"]["reference_top1"]
        top1 = np.frombuffer(raw, "<i4", entry["shape"][0], entry["offset"])
        assert heard["alert"] is None
        assert heard["answer"] == f"speaker {top1[5] + 1}"
        done, total = map(int, heard["place"].split("/"))
        assert done == total - 5  # five steps back by keyboard
        assert f"after {done} of {total} frames" in heard["scrubbed"]["confidence"]
        streams = bool(model["streaming"])
        assert ("one step a frame" in heard["timing"]) == streams
        assert ("one step of the streaming model" in heard["mode"]) == streams


def test_web_accuracy_equals_native_on_every_sample(
    tour: dict[str, Any], bundles: list[Path], measured: dict[str, Any]
) -> None:
    runs = settings_of(the_report())
    for path in bundles:
        bundle = Bundle.open(path)
        model = path.name
        predictions, latency = {}, {}
        data = read_evaluation(path / "evaluation", subject=bundle.manifest["recipe_sha256"])
        count = len(data.dataset)
        for name, artifact in bundle.artifacts().items():
            with TARGETS.get(name).load(artifact) as session:
                feeds = [
                    {k: v[i : i + 1] for k, v in data.dataset.inputs.items()} for i in range(count)
                ]
                rows = [session.run(f)[data.output][0] for f in feeds]
                if data.dataset.lengths is not None:  # the answer is the last real step's
                    rows = [r[n - 1] for r, n in zip(rows, data.dataset.lengths, strict=True)]
                predictions[name] = [int(r.argmax()) for r in rows]
                times = []
                for _ in range(200):
                    start = time.perf_counter()
                    session.run(feeds[0])
                    times.append(1000 * (time.perf_counter() - start))
                latency[name] = min(times)
            web = runs[model, name]
            assert web["evaluation"]["predictions"] == predictions[name]
            fastest = min(web["latency"]["inference_ms"])
            measured[f"{model} {name} latency, browser / native, fastest run"] = [
                round(fastest, 3),
                round(latency[name], 3),
                round(fastest / latency[name], 2),
            ]
    for card in tour["results"]:
        if card["kind"] == "accuracy":
            assert card["agreeing"] == card["samples"]
            assert card["complete"] == "true"


def test_web_report_goes_through_merge(
    tour: dict[str, Any], package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ARTIFACTS / "web-report.json"
    out = tmp_path / "merged"
    arguments = ["report", "merge", str(path), "--package", str(package), "--out", str(out)]
    assert run(arguments) == 0, capsys.readouterr()
    merged = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    assert "CI Chromium" in json.dumps(merged)
    report = the_report()
    runs = settings_of(report)
    assert {(m, f) for m in RECIPES for f in ("onnx", "tflite")} <= set(runs)
    for run_ in runs.values():
        assert run_["errors"] == []
        assert run_["entry"] == "step" or len(run_["latency"]["inference_ms"]) == 60
        assert all(case["error"] is None for case in run_["golden"])
    assert report["device"]["label"] == "CI Chromium"
    # A report whose model is another one must not get through.
    damaged = copy.deepcopy(report)
    damaged["runs"][0]["model_sha256"] = "0" * 64
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(damaged), encoding="utf-8")
    again = ["report", "merge", str(wrong), "--package", str(package), "--out", str(out), "--force"]
    assert run(again) != 0


def test_web_agrees_with_goldens_within_1e_5(
    tour: dict[str, Any], package: Path, measured: dict[str, Any]
) -> None:
    """Recomputed here from the raw outputs in the report, not read off the page."""
    manifest = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    runs = settings_of(the_report())
    for model in manifest["models"]:
        golden = (package / model["golden"]["file"]["path"]).read_bytes()
        steps = [f"{f} step" for f in (model["streaming"] or {"files": ()})["files"]]
        for form in [*model["files"], *steps]:
            cases = {c["name"]: c for c in runs[model["id"], form]["golden"]}
            assert set(cases) == {c["name"] for c in model["golden"]["cases"]}
            worst = 0.0
            for case in model["golden"]["cases"]:
                for entry in case["outputs"]:
                    count = int(np.prod(entry["shape"]))
                    expected = np.frombuffer(golden, "<f8", count, entry["offset"])
                    got = next(
                        o for o in cases[case["name"]]["outputs"] if o["name"] == entry["name"]
                    )
                    actual = np.frombuffer(base64.b64decode(got["data"]), "<f4")
                    assert got["shape"] == entry["shape"]
                    worst = max(worst, np.abs(actual - expected).max() / np.abs(expected).max())
            measured[f"{model['id']} {form} max_rel"] = float(worst)
            assert worst <= MAX_REL


def test_web_measurements_say_what_ran(tour: dict[str, Any]) -> None:
    assert not any(card["alert"] for card in tour["results"] + tour["threaded"])
    two = [r for r in the_report()["runs"] if r["threads"]["requested"] == 2]
    assert len(two) == 2
    assert all(r["threads"]["effective"] == 2 for r in two)
    sustained = [c for c in tour["results"] if c["kind"] == "sustained"]
    assert len(sustained) == 1
    assert int(sustained[0]["runs"]) > 1
    assert "whole number from" in tour["absurdRuns"]


def test_web_is_accessible(
    tour: dict[str, Any], phone: dict[str, Any], measured: dict[str, Any]
) -> None:
    assert tour["violations"] == []
    assert phone["violations"] == []
    # 0.1 is what Lighthouse still calls good; nothing here needs that much.
    assert tour["layoutShift"] <= 0.02
    measured["cumulative layout shift"] = tour["layoutShift"]


def test_web_on_a_phone(phone: dict[str, Any]) -> None:
    assert phone["state"] == "passed"
    assert phone["touched"]["answer"] == "1"
    assert phone["overflow"] == {"draw": 0, "listen": 0, "measure": 0}
    assert phone["console"] == []


def test_web_first_visit_is_small(
    site: Path, package: Path, chromium: str, measured: dict[str, Any]
) -> None:
    with serve(site, package) as served:
        seen = drive("first", served.url, chromium)
        sent = list(served.sent)
    assert seen["state"] == "passed"
    total = sum(n for path, n in sent if not path.endswith(MODELS))
    measured["bytes of the first visit besides the models"] = total
    measured["bytes of the first visit by file"] = dict(sorted(sent, key=lambda e: -e[1])[:6])
    assert 0 < total <= FIRST_VISIT_BYTES
    assert not any("asyncify" in path or "threaded_internal" in path for path, _ in sent)


def test_web_works_offline_once_loaded(
    site: Path, package: Path, chromium: str, measured: dict[str, Any]
) -> None:
    with serve(site, package) as served:
        seen = drive("visits", served.url, chromium)
    assert seen["offlineSays"] == "Ready to work offline."
    assert seen["states"] == ["passed"] * 3
    assert seen["offlineAnswer"]["answer"] == "3"
    measured["ms to the first prediction, first and second visit"] = seen["firstPredictionMs"]


def test_web_runs_on_webgpu(
    site: Path, package: Path, chromium: str, measured: dict[str, Any]
) -> None:
    """On a software adapter: the API and the numbers are real, the speed is not."""
    with serve(site, package) as served:
        seen = drive("webgpu", served.url, chromium)
    if not seen["adapter"]:
        pytest.skip("this Chromium gives no WebGPU adapter, not even SwiftShader's")
    assert seen["before"] == seen["state"] == "passed"
    found = {(f["model"], f["what"]): f for f in seen["findings"]}
    for model in RECIPES:
        assert found[model, "ort-webgpu"]["verdict"] == "PASS"
        assert float(found[model, "ort-webgpu"]["worst"]) <= MAX_REL
        measured[f"{model} webgpu (SwiftShader) max_rel"] = float(
            found[model, "ort-webgpu"]["worst"]
        )
    assert seen["drawn"]["answer"] == "6"
    assert "webgpu" in seen["drawn"]["timing"]
    assert seen["foreign"] == seen["console"] == []
