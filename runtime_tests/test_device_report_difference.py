"""flowexport report merge --against: what changed beyond the noise since an earlier comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from device_tools import device_report, first, merger, one_wrong, save, set_times, write_bundle

from flowexport.core.errors import BundleError
from flowexport.devices import MergeResult
from flowexport.package import Package, make_package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("difference")
    return Package.open(make_package([write_bundle(folder)], folder / "package").path)


@pytest.fixture
def merged(package: Package, tmp_path: Path) -> Callable[..., MergeResult]:
    return merger(package, tmp_path)


def test_difference_beyond_noise(
    package: Package, merged: Callable[..., MergeResult], tmp_path: Path
) -> None:
    before = merged(device_report(package, ms=2.0, seed=1))
    earlier = Path(shutil.copy(before.path / "merge.json", tmp_path / "earlier.json"))
    same = merged(device_report(package, ms=2.0, seed=2), against=earlier)
    assert {e["change"] for e in same.document["difference"]["entries"]} == {"same"}

    now = device_report(package, ms=3.0, seed=3)
    one_wrong(first(now))
    result = merged(now, against=earlier)
    worse = {(e["key"]["format"], e["metric"]) for e in result.worse}
    latency = {("onnx", "latency"), ("tflite", "latency")}
    assert worse == latency | {("onnx", "verdict"), ("onnx", "accuracy")}
    entry = next(e for e in result.worse if e["metric"] == "latency")
    assert entry["ci_low"] <= entry["ratio"] <= entry["ci_high"] and 1.3 < entry["ratio"] < 1.7
    faster = merged(device_report(package, ms=1.0, seed=4), against=earlier)
    changes = {(e["metric"], e["change"]) for e in faster.document["difference"]["entries"]}
    assert ("latency", "better") in changes and faster.worse == []


def test_difference_of_unusable_new_and_gone(
    package: Package, merged: Callable[..., MergeResult], tmp_path: Path
) -> None:
    before = merged(device_report(package))
    earlier = Path(shutil.copy(before.path / "merge.json", tmp_path / "earlier.json"))
    now = device_report(package)
    set_times(now["runs"][0], [-1.0] * 30)
    now["runs"][1]["backend"]["effective"] = "webgpu"
    entries = merged(now, against=earlier).document["difference"]["entries"]
    changes = {(e["metric"], e["change"]) for e in entries}
    assert {("latency", "unknown"), ("row", "new"), ("row", "gone")} <= changes
    assert ("latency", "better") not in changes, "absurd times are no improvement"


def test_an_edited_earlier_statistic_is_not_believed(
    package: Package, merged: Callable[..., MergeResult], tmp_path: Path
) -> None:
    result = merged(device_report(package))
    document = json.loads((result.path / "merge.json").read_text())
    for row in document["rows"]:
        row["latency"]["statistics"]["latency_ms_p50"] = 0.01
    earlier = save(tmp_path / "earlier.json", document)
    assert merged(device_report(package), against=earlier).worse == []
    document["rows"][0]["verdict"] = "GREAT"
    with pytest.raises(BundleError, match="GREAT"):
        merged(device_report(package), against=save(earlier, document))
