"""The web demo in a real Chromium: what people do, what it measures, and what it must refuse.

Builds web_demo/, makes bundles and a package, serves them as ``flowexport demo`` does and drives
the page by Playwright (web_demo/test/browser). Screenshots are left in .ci/artifacts/.
FLOWEXPORT_WEB_BUNDLES names a folder with the bundles digits and japanese-vowels to use instead
of converting them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowexport
from flowexport.bundle import Bundle
from flowexport.cli import run
from flowexport.demo import Site, find_site, open_server
from flowexport.package import Package, make_package
from flowexport.registry import TARGETS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web_demo"
ARTIFACTS = ROOT / ".ci" / "artifacts"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
MAX_REL = 1e-5
FIRST_VISIT_BYTES = 9_000_000
MODELS = (".onnx", ".tflite")
MEASURED: dict[str, Any] = {}
"""What the goals are about; written to .ci/artifacts/web_demo.json."""


def _need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is missing: node 20 or newer with npm builds web_demo")
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in CHROMIUM:
        if found := shutil.which(name):
            return found
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(
            "Chromium is missing, and it is not for this user to install: apt-get install chromium"
        )
    commands = [
        ["apt-get", "update", "-qq"],
        [
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            "chromium",
            "fonts-dejavu-core",
        ],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(
                f"Chromium is missing, and {' '.join(command)} failed: {done.stderr[-300:]}"
            )
    return str(shutil.which("chromium"))


@pytest.fixture(scope="session")
def site() -> Path:
    npm = _need("npm")
    _need("node")
    for arguments in (["ci", "--no-audit", "--no-fund"], ["run", "build"]):
        done = subprocess.run(
            [npm, *arguments], cwd=WEB, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"npm {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return find_site(None)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    given = os.environ.get("FLOWEXPORT_WEB_BUNDLES")
    if given:
        return [Path(given) / "digits", Path(given) / "japanese-vowels"]
    for name in ("onnx", "tflite"):
        availability = TARGETS.get(name).probe()
        if not availability.converts:
            pytest.skip(f"target {name} is not available: {availability.reason}")
    out = tmp_path_factory.mktemp("bundles")
    return [
        flowexport.convert(
            name, targets=["onnx", "tflite"], out=out / name, threads=1, bench=False
        ).bundle
        for name in ("digits", "japanese-vowels")
    ]


@pytest.fixture(scope="session")
def package(bundles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(bundles, tmp_path_factory.mktemp("package") / "web", client="web").path


@dataclass
class Served:
    """A running demo; `sent` counts the bytes of each answer's body as they went out."""

    url: str
    sent: list[tuple[str, int]] = field(default_factory=list)


@contextlib.contextmanager
def serve(site: Path, package: Path) -> Iterator[Served]:
    # Damaged packages are served on purpose; `flowexport demo` itself refuses them.
    opened = Package.open(package, check_files=False)
    with open_server(Site.make(site, opened), port=0) as server:
        served = Served(f"http://127.0.0.1:{server.port}/")
        handler: Any = server.RequestHandlerClass

        class Counting(handler):
            def send_header(self, keyword: str, value: str) -> None:
                if keyword == "Content-Length":
                    served.sent.append((self.path, int(value)))
                super().send_header(keyword, value)

        server.RequestHandlerClass = Counting
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def drive(scenario: str, url: str, chromium: str, out: Path = ARTIFACTS) -> dict[str, Any]:
    """Run one scenario of web_demo/test/browser/drive.mjs; return what it saw."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [_need("node"), "test/browser/drive.mjs", scenario, url, str(out), chromium],
        cwd=WEB,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{scenario}: {done.stderr[-3000:]}"
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="session")
def tour(site: Path, package: Path, chromium: str) -> dict[str, Any]:
    with serve(site, package) as served:
        return drive("tour", served.url, chromium)


@pytest.fixture(scope="session", autouse=True)
def _write_measured() -> Iterator[None]:
    yield
    if MEASURED:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(MEASURED, indent=1, sort_keys=True)
        (ARTIFACTS / "web_demo.json").write_text(text, encoding="utf-8")


def the_report() -> dict[str, Any]:
    return dict(json.loads((ARTIFACTS / "web-report.json").read_text(encoding="utf-8")))


def settings_of(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """One-thread runs by (model, format)."""
    runs = [r for r in report["runs"] if r["threads"]["requested"] == 1]
    return {(r["model"], r["format"]): r for r in runs}


def test_web_client_code_in_node(site: Path, package: Path) -> None:
    done = subprocess.run(
        [_need("npm"), "test"],
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
    for model in ("digits", "japanese-vowels"):
        for what in ("preprocessing", "ort-wasm", "litert-wasm"):
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
    heard = tour["heard"]
    evaluation = next(
        m["evaluation"]
        for m in json.loads((package / "manifest.json").read_text(encoding="utf-8"))["models"]
        if m["id"] == "japanese-vowels"
    )
    raw = (package / evaluation["file"]["path"]).read_bytes()
    entry = evaluation["reference_top1"]
    top1 = np.frombuffer(raw, "<i4", entry["shape"][0], entry["offset"])
    assert heard["alert"] is None
    assert heard["answer"] == f"speaker {top1[5] + 1}"
    done, total = map(int, heard["place"].split("/"))
    assert done == total - 5  # five steps back by keyboard
    assert f"after {done} of {total} frames" in heard["scrubbed"]["confidence"]


def test_web_accuracy_equals_native_on_every_sample(
    tour: dict[str, Any], bundles: list[Path]
) -> None:
    runs = settings_of(the_report())
    for path in bundles:
        bundle = Bundle.open(path)
        model = path.name
        predictions, latency = {}, {}
        from flowexport.parity import read_evaluation

        data = read_evaluation(path / "evaluation", subject=bundle.manifest["recipe_sha256"])
        count = len(data.dataset)
        for name, artifact in bundle.artifacts().items():
            with TARGETS.get(name).load(artifact) as session:
                feeds = [
                    {k: v[i : i + 1] for k, v in data.dataset.inputs.items()} for i in range(count)
                ]
                predictions[name] = [
                    int(np.argmax(session.run(f)[data.output], axis=-1)[0]) for f in feeds
                ]
                times = []
                for _ in range(200):
                    start = time.perf_counter()
                    session.run(feeds[0])
                    times.append(1000 * (time.perf_counter() - start))
                latency[name] = min(times)
            web = runs[model, name]
            assert web["evaluation"]["predictions"] == predictions[name]
            fastest = min(web["latency"]["inference_ms"])
            MEASURED[f"{model} {name} latency, browser / native, fastest run"] = [
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
    assert {(m, f) for m in ("digits", "japanese-vowels") for f in ("onnx", "tflite")} <= set(runs)
    for run_ in runs.values():
        assert run_["errors"] == []
        assert len(run_["latency"]["inference_ms"]) == 60
        assert all(case["error"] is None for case in run_["golden"])
    assert report["device"]["label"] == "CI Chromium"
    # A report whose model is another one must not get through.
    damaged = copy.deepcopy(report)
    damaged["runs"][0]["model_sha256"] = "0" * 64
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(damaged), encoding="utf-8")
    again = ["report", "merge", str(wrong), "--package", str(package), "--out", str(out), "--force"]
    assert run(again) != 0


def test_web_agrees_with_goldens_within_1e_5(tour: dict[str, Any], package: Path) -> None:
    """Recomputed here from the raw outputs in the report, not read off the page."""
    import base64

    manifest = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    runs = settings_of(the_report())
    for model in manifest["models"]:
        golden = (package / model["golden"]["file"]["path"]).read_bytes()
        for form in model["files"]:
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
            MEASURED[f"{model['id']} {form} max_rel"] = float(worst)
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


def test_web_is_accessible(tour: dict[str, Any], phone: dict[str, Any]) -> None:
    assert tour["violations"] == []
    assert phone["violations"] == []
    # 0.1 is what Lighthouse still calls good; nothing here needs that much.
    assert tour["layoutShift"] <= 0.02
    MEASURED["cumulative layout shift"] = tour["layoutShift"]


@pytest.fixture(scope="session")
def phone(site: Path, package: Path, chromium: str) -> dict[str, Any]:
    with serve(site, package) as served:
        return drive("phone", served.url, chromium)


def test_web_on_a_phone(phone: dict[str, Any]) -> None:
    assert phone["state"] == "passed"
    assert phone["touched"]["answer"] == "1"
    assert phone["overflow"] == {"draw": 0, "listen": 0, "measure": 0}
    assert phone["console"] == []


def test_web_first_visit_is_small(site: Path, package: Path, chromium: str) -> None:
    with serve(site, package) as served:
        seen = drive("first", served.url, chromium)
        sent = list(served.sent)
    assert seen["state"] == "passed"
    total = sum(n for path, n in sent if not path.endswith(MODELS))
    MEASURED["bytes of the first visit besides the models"] = total
    MEASURED["bytes of the first visit by file"] = dict(sorted(sent, key=lambda e: -e[1])[:6])
    assert 0 < total <= FIRST_VISIT_BYTES
    assert not any("asyncify" in path or "threaded_internal" in path for path, _ in sent)


def test_web_works_offline_once_loaded(site: Path, package: Path, chromium: str) -> None:
    with serve(site, package) as served:
        seen = drive("visits", served.url, chromium)
    assert seen["offlineSays"] == "Ready to work offline."
    assert seen["states"] == ["passed"] * 3
    assert seen["offlineAnswer"]["answer"] == "3"
    MEASURED["ms to the first prediction, first and second visit"] = seen["firstPredictionMs"]


def test_web_without_isolation_says_so(site: Path, package: Path, chromium: str) -> None:
    with serve(site, package) as served:
        seen = drive("unisolated", served.url, chromium)
    assert seen["state"] == "passed"
    assert seen["threads"] == ["1"]
    assert any("not cross-origin isolated" in n for n in seen["notices"])


def test_web_runs_on_webgpu(site: Path, package: Path, chromium: str) -> None:
    """On a software adapter: the API and the numbers are real, the speed is not."""
    with serve(site, package) as served:
        seen = drive("webgpu", served.url, chromium)
    if not seen["adapter"]:
        pytest.skip("this Chromium gives no WebGPU adapter, not even SwiftShader's")
    assert seen["before"] == seen["state"] == "passed"
    found = {(f["model"], f["what"]): f for f in seen["findings"]}
    for model in ("digits", "japanese-vowels"):
        assert found[model, "ort-webgpu"]["verdict"] == "PASS"
        assert float(found[model, "ort-webgpu"]["worst"]) <= MAX_REL
        MEASURED[f"{model} webgpu (SwiftShader) max_rel"] = float(
            found[model, "ort-webgpu"]["worst"]
        )
    assert seen["drawn"]["answer"] == "6"
    assert "webgpu" in seen["drawn"]["timing"]
    assert seen["foreign"] == seen["console"] == []


def test_web_without_simd_says_so(site: Path, package: Path, chromium: str) -> None:
    with serve(site, package) as served:
        seen = drive("nosimd", served.url, chromium)
    assert seen["state"] == "none" or seen["state"] == "passed"
    assert any("no WebAssembly SIMD" in n for n in seen["notices"])
    models = [f for f in seen["findings"] if f["what"] != "preprocessing"]
    assert models
    assert {f["verdict"] for f in models} == {"NOT_RUN"}
    assert "SIMD" in seen["draw"]["alert"]


def damage(package: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(package, out)
    return out, json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def put(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def declare(folder: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    """Make the manifest agree with a damaged file, so that only its content is wrong."""
    raw = (folder / entry["path"]).read_bytes()
    entry["sha256"], entry["size_bytes"] = hashlib.sha256(raw).hexdigest(), len(raw)
    manifest["files"][entry["path"]] = {k: entry[k] for k in ("sha256", "size_bytes")}


def verdicts(seen: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(f["model"], f["what"]): f["verdict"] for f in seen["findings"]}


def test_web_shows_a_perturbed_golden(
    site: Path, package: Path, chromium: str, tmp_path: Path
) -> None:
    folder, manifest = damage(package, tmp_path / "package")
    digits = manifest["models"][0]
    place = folder / digits["golden"]["file"]["path"]
    raw = bytearray(place.read_bytes())
    output = digits["golden"]["cases"][0]["outputs"][0]
    values = np.frombuffer(raw, "<f8", int(np.prod(output["shape"])), output["offset"])
    moved = values + 1e-3 * np.abs(values).max()
    raw[output["offset"] : output["offset"] + output["bytes"]] = moved.astype("<f8").tobytes()
    place.write_bytes(raw)
    declare(folder, manifest, digits["golden"]["file"])
    put(folder, manifest)
    with serve(site, folder) as served:
        seen = drive("broken", served.url, chromium, ARTIFACTS / "perturbed-golden")
    assert seen["state"] == "failed"
    found = verdicts(seen)
    assert found["digits", "ort-wasm"] == found["digits", "litert-wasm"] == "FAIL"
    assert found["digits", "preprocessing"] == found["japanese-vowels", "ort-wasm"] == "PASS"
    assert "FAILED" in seen["health"]
    assert any(digits["golden"]["cases"][0]["name"] in n for n in seen["notices"])
    assert seen["console"] == []


def test_web_shows_perturbed_preprocessing(
    site: Path, package: Path, chromium: str, tmp_path: Path
) -> None:
    folder, manifest = damage(package, tmp_path / "package")
    source = manifest["models"][0]["preprocessing"]["sources"][-1]
    source["inputs"]["image"][3]["factor"] *= 1.001
    put(folder, manifest)
    with serve(site, folder) as served:
        seen = drive("broken", served.url, chromium, ARTIFACTS / "perturbed-preprocessing")
    found = verdicts(seen)
    assert seen["state"] == "failed"
    assert found["digits", "preprocessing"] == "FAIL"
    assert found["digits", "ort-wasm"] == "PASS"


@pytest.mark.parametrize("kind", ["truncated", "wrong hash"])
def test_web_shows_a_damaged_model(
    kind: str, site: Path, package: Path, chromium: str, tmp_path: Path
) -> None:
    folder, manifest = damage(package, tmp_path / "package")
    entry = manifest["models"][0]["files"]["onnx"]
    place = folder / entry["path"]
    if kind == "truncated":
        place.write_bytes(place.read_bytes()[: entry["size_bytes"] // 2])
        expected = f"has {entry['size_bytes'] // 2} bytes"
    else:
        entry["sha256"] = "f" * 64
        put(folder, manifest)
        expected = "the manifest says ffffffffffff"
    with serve(site, folder) as served:
        seen = drive("broken", served.url, chromium, ARTIFACTS / kind.replace(" ", "-"))
    found = verdicts(seen)
    assert seen["state"] == "failed"
    assert found["digits", "ort-wasm"] == "FAIL"
    assert found["digits", "litert-wasm"] == "PASS"
    assert any(expected in n for n in seen["notices"])
    # A damaged file is no reason to answer with another one.
    assert seen["draw"]["answer"] == "–"
    assert "No answer" in seen["draw"]["alert"]


def test_web_falls_back_from_a_model_that_a_runtime_refuses(
    site: Path, package: Path, chromium: str, tmp_path: Path
) -> None:
    folder, manifest = damage(package, tmp_path / "package")
    entry = manifest["models"][0]["files"]["onnx"]
    place = folder / entry["path"]
    place.write_bytes(place.read_bytes()[: entry["size_bytes"] // 2])
    declare(folder, manifest, entry)
    put(folder, manifest)
    with serve(site, folder) as served:
        seen = drive("broken", served.url, chromium, ARTIFACTS / "refused-model")
    assert seen["state"] == "failed"
    assert verdicts(seen)["digits", "ort-wasm"] == "FAIL"
    assert seen["draw"]["answer"] == "3"
    assert "LiteRT" in seen["draw"]["timing"]
    assert "not ONNX Runtime" in seen["draw"]["timing"]
    assert any("was asked for, LiteRT is used" in n for n in seen["notices"])


def test_web_refuses_another_schema_version(
    site: Path, package: Path, chromium: str, tmp_path: Path
) -> None:
    folder, manifest = damage(package, tmp_path / "package")
    original = folder / "manifest.json"
    opened = Package.open(folder, check_files=False)
    manifest["schema"] = "flowexport.package/2"
    put(folder, manifest)
    assert original.is_file()
    assert opened.manifest["schema"] == "flowexport.package/1"
    with serve_opened(site, opened) as url:
        seen = drive("broken", url, chromium, ARTIFACTS / "other-schema")
    assert seen["state"] == "failed"
    assert any("flowexport.package/2" in n and "flowexport.package/1" in n for n in seen["notices"])
    assert seen["findings"] == []
    assert "could not be used" in seen["text"]


@contextlib.contextmanager
def serve_opened(site: Path, opened: Package) -> Iterator[str]:
    """Serve a package that was sound when it was opened and is not any more."""
    with open_server(Site.make(site, opened), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}/"
        finally:
            server.shutdown()
            thread.join()
