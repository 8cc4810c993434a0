"""flowexport package: what is in it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_tools import device_report, save, write_bundle
from evidence_fakes import evaluation, golden
from way_tools import refused

from flowexport.bundle import file_table, write_json
from flowexport.cli import run
from flowexport.core.errors import BundleError, InputError, VerificationError
from flowexport.core.hashing import sha256_file
from flowexport.core.streaming import StreamState
from flowexport.devices import merge_reports
from flowexport.package import CLIENTS, Package, make_package
from flowexport.package.binary import Binary, read_tensor
from flowexport.package.build import choose_samples
from flowexport.package.read import check_manifest
from flowexport.parity import write_state


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def package(bundle: Path, tmp_path: Path) -> Package:
    return Package.open(make_package([bundle], tmp_path / "package").path)


def test_a_package_holds_what_a_client_needs(bundle: Path, package: Package) -> None:
    (model,) = package.manifest["models"]
    assert model["id"] == "fakes" and model["task"] == "time-series-classification"
    assert list(model["files"]) == ["onnx", "tflite"], "no file that a browser cannot run"
    for name, file in model["files"].items():
        source = json.loads((bundle / "manifest.json").read_text())["targets"][name]
        assert file["sha256"] == source["sha256"] == sha256_file(package.path / file["path"])
        assert file["tolerance"] == source["tolerance"] and file["tolerance"]["reason"]
        assert file["verification"]["verdict"] == "PASS"
        assert file["verification"]["accuracy"] == pytest.approx(0.9)
    on_disk = {p.relative_to(package.path).as_posix() for p in package.path.rglob("*")}
    files = {n for n in on_disk if (package.path / n).is_file()}
    assert set(package.manifest["files"]) == files - {"manifest.json"}


def test_goldens_are_the_bundles(package: Package) -> None:
    (model,) = package.manifest["models"]
    inputs, outputs = package.golden(model)
    truth = golden()
    assert list(inputs) == list(truth.cases)
    for case, feeds in truth.cases.items():
        for name, value in feeds.items():
            assert np.array_equal(inputs[case][name], value)
        for name, value in truth.expected[case].items():
            assert outputs[case][name].dtype == np.float64
            assert np.array_equal(outputs[case][name], value)
    for case in model["golden"]["cases"]:
        for tensor in (*case["inputs"], *case["outputs"]):
            assert tensor["offset"] % 8 == 0


def test_evaluation_and_its_limit(bundle: Path, package: Package, tmp_path: Path) -> None:
    whole = package.evaluation(package.manifest["models"][0])
    truth = evaluation()
    assert np.array_equal(whole["targets"], truth.dataset.targets)
    assert np.array_equal(whole["reference_top1"], truth.reference_logits.argmax(1))
    assert np.array_equal(whole["input/x"], truth.dataset.inputs["x"])
    small = Package.open(make_package([bundle], tmp_path / "small", samples=8).path)
    entry = small.manifest["models"][0]["evaluation"]
    assert (entry["samples"], entry["of_samples"]) == (8, 40)
    targets = small.evaluation(small.manifest["models"][0])["targets"]
    assert set(targets) == set(whole["targets"]), "classes take turns"


def test_choose_samples_keeps_the_order() -> None:
    targets = np.array([0, 0, 0, 1, 2, 2])
    assert choose_samples(targets, 3).tolist() == [0, 3, 4]
    assert choose_samples(targets, 6).tolist() == list(range(6))


def test_clients_get_what_they_run(bundle: Path, tmp_path: Path) -> None:
    for client, formats in CLIENTS.items():
        result = make_package([bundle], tmp_path / client, client=client)
        assert set(result.manifest["models"][0]["files"]) <= set(formats)
        assert result.manifest["client"] == client
        assert result.left_out == {"fakes": ("tensorrt",)}


def test_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "package"
    assert run(["package", str(bundle), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["package"] == str(out) and document["models"]["fakes"]["samples"] == 40
    assert document["models"]["fakes"]["left_out"] == ["tensorrt"]
    refused(capsys, 2, "exists already", arguments=["package", bundle, "--out", out])
    assert run(["package", str(bundle), "--out", str(out), "--force"]) == 0
    assert "PASS" in capsys.readouterr().out


def test_force_replaces_packages_only(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years of work")
    arguments: list[object] = ["package", bundle, "--out", mine, "--force"]
    refused(capsys, 2, "is no package", arguments=arguments)
    assert (mine / "thesis.txt").read_text() == "ten years of work"
    refused(capsys, 2, "is no package", arguments=["package", bundle, "--out", bundle, "--force"])


def test_bad_input_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refused(capsys, 2, "android", arguments=["package", bundle, "--out", out, "--client", "palm"])
    refused(capsys, 2, "does not exist", arguments=["package", tmp_path / "no", "--out", out])
    refused(capsys, 2, "2 bundles", arguments=["package", bundle, bundle, "--out", out])
    assert not out.exists(), "nothing half is left"


def test_a_failed_verification_is_not_shipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_bundle(tmp_path, damaged="tflite")
    out = tmp_path / "out"
    refused(capsys, 4, "tflite failed its verification", arguments=["package", bad, "--out", out])
    other = write_bundle(tmp_path, "other", damaged="tensorrt")
    assert run(["package", str(other), "--out", str(out)]) == 0, "what is not shipped may fail"


def test_an_unverified_file_is_said_to_be_so(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "fakes"))
    report = json.loads((copy / "report.json").read_text())
    report["targets"]["onnx"] = {"verdict": "NOT_RUN", "parity": None, "latency": None}
    write_json(copy / "report.json", report)
    assert run(["package", str(copy), "--out", str(tmp_path / "out")]) == 0
    assert "onnx was not verified" in capsys.readouterr().err
    files = Package.open(tmp_path / "out").manifest["models"][0]["files"]
    assert files["onnx"]["verification"]["verdict"] == "NOT_RUN"
    assert files["onnx"]["verification"]["max_rel"] is None, "missing is null, never zero"


def test_a_changed_artifact_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "fakes"))
    file = copy / "onnx" / "onnx.npz"
    file.write_bytes(file.read_bytes()[:-1])
    arguments: list[object] = ["package", copy, "--out", tmp_path / "out"]
    refused(capsys, 4, "onnx.npz has sha256", arguments=arguments)
    file.unlink()
    refused(capsys, 4, "is missing", arguments=arguments)


def test_a_changed_golden_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "fakes"))
    file = copy / "golden" / "cases.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    refused(capsys, 2, "golden", arguments=["package", copy, "--out", tmp_path / "out"])


def test_a_report_on_another_file_does_not_vouch(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A swapped artifact with a fitting manifest, but the old report."""
    copy = Path(shutil.copytree(bundle, tmp_path / "fakes"))
    shutil.copyfile(copy / "tflite" / "tflite.npz", copy / "onnx" / "onnx.npz")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["targets"]["onnx"]["sha256"] = manifest["targets"]["tflite"]["sha256"]
    manifest["files"] = file_table(copy)
    write_json(copy / "manifest.json", manifest)
    arguments: list[object] = ["package", copy, "--out", tmp_path / "out"]
    refused(capsys, 4, "another file", arguments=arguments)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p, m: p.write_bytes(p.read_bytes()[:-8]), id="truncated"),
        pytest.param(lambda p, m: p.write_bytes(b"\1" + p.read_bytes()[1:]), id="one byte"),
        pytest.param(lambda p, m: p.unlink(), id="missing"),
    ],
)
@pytest.mark.parametrize("name", ["golden.bin", "evaluation.bin", "fakes.npz"])
def test_a_damaged_package_is_not_opened(package: Package, name: str, damage: Any) -> None:
    damage(package.path / "models" / "fakes" / name, package.manifest)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Package.open(package.path)


def test_another_schema_is_refused_by_name(package: Package) -> None:
    file = package.path / "manifest.json"
    manifest = {**package.manifest, "schema": "flowexport.package/2"}
    write_json(file, manifest)
    with pytest.raises(
        BundleError, match=r"flowexport\.package/2.*expected 'flowexport\.package/1'"
    ):
        Package.open(package.path)


def test_the_schema_bites(package: Package) -> None:
    def broken(change: Any) -> None:
        manifest = json.loads(json.dumps(package.manifest))
        change(manifest["models"][0], manifest)
        with pytest.raises(BundleError):
            check_manifest(manifest, "test")

    check_manifest(package.manifest, "test")
    broken(lambda m, p: m["files"]["onnx"].update(path="../../etc/passwd"))
    broken(lambda m, p: m["files"]["onnx"].update(path="/etc/passwd"))
    broken(lambda m, p: m["files"].clear())
    broken(lambda m, p: m["files"].update(wasm=m["files"]["onnx"]))
    broken(lambda m, p: m["golden"]["cases"][0]["inputs"][0].update(offset=4))
    broken(lambda m, p: m["preprocessing"]["sources"][0]["inputs"]["x"].append({"op": "sharpen"}))
    broken(lambda m, p: m.pop("streaming"))
    broken(lambda m, p: p["models"].clear())


def test_a_tensor_outside_its_file_is_refused(tmp_path: Path) -> None:
    binary = Binary(tmp_path / "t.bin", tmp_path)
    first = binary.add("a", np.arange(3, dtype=np.float32))
    second = binary.add("b", np.arange(2, dtype=np.float64))
    binary.write()
    data = (tmp_path / "t.bin").read_bytes()
    assert (first["offset"], second["offset"], len(data)) == (0, 16, 32)
    assert read_tensor(data, second, "test").tolist() == [0.0, 1.0]
    for wrong in ({"offset": 24}, {"bytes": 8}, {"shape": [3]}):
        with pytest.raises(BundleError, match="inside the file"):
            read_tensor(data, {**second, **wrong}, "test")
    with pytest.raises(InputError, match="int64"):
        binary.add("c", np.arange(3))


def test_a_causal_models_step_goes_along(bundle: Path, tmp_path: Path) -> None:
    """ONNX has the step in a file beside the model, TFLite as a function of the same file."""
    copy = Path(shutil.copytree(bundle, tmp_path / "fakes"))
    step = copy / "onnx" / "step.npz"
    np.savez(step, w=np.zeros(3))
    manifest = json.loads((copy / "manifest.json").read_text())
    frame, logits = ("x", ["batch", 3]), ("logits", ["batch", 4])
    sums, following = ("sums", ["batch", 2, 5]), ("next_sums", ["batch", 2, 5])

    def specs(*pairs: tuple[str, list[Any]]) -> list[dict[str, Any]]:
        return [{"name": n, "shape": s, "dtype": "float32"} for n, s in pairs]

    for target, file in (("onnx", step), ("tflite", copy / "tflite" / "tflite.npz")):
        manifest["targets"][target]["functions"] = {
            "step": {
                "path": file.relative_to(copy).as_posix(),
                "sha256": sha256_file(file),
                "size_bytes": file.stat().st_size,
                "inputs": specs(frame, sums),
                "outputs": specs(logits, following),
                "state": {"sums": "next_sums"},
            }
        }
    manifest["streaming"] = {
        "lengths": [7],
        "max_steps": None,
        "reset": "golden/state.safetensors",
        "state": [{"name": "sums", "shape": [1, 2, 5], "dtype": "float32"}],
        "state_bytes": 40,
    }
    zeros = {"sums": np.zeros((1, 2, 5), np.float32)}
    write_state(copy / "golden" / "state.safetensors", StreamState("fake-classifier", zeros, 0))
    manifest["files"] = file_table(copy)
    write_json(copy / "manifest.json", manifest)
    package = Package.open(make_package([copy], tmp_path / "out").path)
    (model,) = package.manifest["models"]
    streaming = model["streaming"]
    assert streaming["states"] == [
        {"name": "sums", "next": "next_sums", "shape": [1, 2, 5], "dtype": "float32", "initial": 0}
    ]
    report = device_report(package)
    report["runs"] = [
        {**r, "entry": "step", "model_sha256": streaming["files"][r["format"]]["sha256"]}
        for r in report["runs"]
    ]
    merged = merge_reports(
        [save(tmp_path / "r.json", report)], tmp_path / "m", packages=[package.path]
    )
    assert [(r.key["format"], r.verdict) for r in merged.rows] == [
        ("onnx step", "PASS"), ("tflite step", "PASS")
    ]  # fmt: skip
    assert streaming["inputs"] == specs(frame) and streaming["outputs"] == specs(logits)
    onnx, tflite = streaming["files"]["onnx"], streaming["files"]["tflite"]
    assert onnx["entry"] is None and onnx["path"] != model["files"]["onnx"]["path"]
    assert sha256_file(package.path / onnx["path"]) == sha256_file(step)
    assert tflite["entry"] == "step" and tflite["path"] == model["files"]["tflite"]["path"]
    step.write_bytes(b"another")
    with pytest.raises(VerificationError, match=r"step\.npz"):
        make_package([copy], tmp_path / "no")


def test_a_file_with_an_apps_own_ends_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["targets"]["tflite"]["details"]["image"] = {"layout": "nhwc"}
    write_json(copy / "manifest.json", manifest)
    with pytest.raises(InputError, match="the tflite file takes the image in another layout"):
        make_package([copy], tmp_path / "package")
    assert not (tmp_path / "package").exists()
