"""The web demo where something is wrong: told on the page, never counted as success."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from web_tools import ARTIFACTS, damage, declare, drive, put, serve, serve_opened, verdicts

from flowexport.package import Package

pytest_plugins = ["web_fixtures"]
pytestmark = pytest.mark.slow


def test_web_without_isolation_says_so(site: Path, package: Path, chromium: str) -> None:
    with serve(site, package) as served:
        seen = drive("unisolated", served.url, chromium)
    assert seen["state"] == "passed"
    assert seen["threads"] == ["1"]
    assert any("not cross-origin isolated" in n for n in seen["notices"])


def test_web_without_simd_says_so(site: Path, package: Path, chromium: str) -> None:
    with serve(site, package) as served:
        seen = drive("nosimd", served.url, chromium)
    assert seen["state"] == "none" or seen["state"] == "passed"
    assert any("no WebAssembly SIMD" in n for n in seen["notices"])
    models = [f for f in seen["findings"] if f["what"] != "preprocessing"]
    assert models
    assert {f["verdict"] for f in models} == {"NOT_RUN"}
    assert "SIMD" in seen["draw"]["alert"]


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
