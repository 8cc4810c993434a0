"""Core ML: numbers of the saved package, names, metadata, same bytes, bad input."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mobile_models import (
    INPUTS,
    LABELS,
    largest_error,
    layer,
    layer_feeds,
    layer_program,
    truth,
)
from torch import nn

from flowexport.core.errors import (
    ConversionError,
    FlowExportError,
    InputError,
)
from flowexport.core.hashing import sha256_tree, size_tree
from flowexport.core.types import Artifact, Options, Precision, Session, TensorSpec
from flowexport.lowering import lower
from flowexport.targets.coreml import TARGET, package
from flowexport.targets.coreml.interpreter import InterpreterSession

pytest.importorskip("coremltools", reason="needs flowexport[coreml]")

# float32 arithmetic of one layer, some 1e-7 an operation.
FP32_TOLERANCE = 1e-5
# Every result rounded to 11 bits (4.9e-4): some dozens of operations, errors partly cancel.
FP16_TOLERANCE = 1e-2


def interpreted(artifact: Artifact, mode: str = "exact") -> Session:
    """Return the saved package on the reference interpreter: it reads what is on the disk."""
    return InterpreterSession(artifact, mode=mode)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("fp32")
    return TARGET.convert(layer_program("timeseries"), Options(Precision.FP32), out)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("fp16")
    program = layer_program("timeseries", Precision.FP16)
    return TARGET.convert(program, Options(Precision.FP16), out)


def test_fp32_package_computes_what_torch_does_and_the_check_can_fail(fp32: Artifact) -> None:
    feeds = layer_feeds()
    with interpreted(fp32) as session:
        result = session.run(feeds)
    assert largest_error(result, truth(layer("timeseries"), feeds)) <= FP32_TOLERANCE
    assert largest_error(result, truth(layer("timeseries", seed=6), feeds)) > 0.1
    assert largest_error(result, truth(layer("timeseries"), layer_feeds(2))) > 0.1


def test_fp16_package_is_half_inside_and_float32_at_its_ends(fp16: Artifact) -> None:
    feeds = layer_feeds()
    with interpreted(fp16, "fp16") as session:
        result = session.run(feeds)
    error = largest_error(result, truth(layer("timeseries"), feeds))
    assert FP32_TOLERANCE < error <= FP16_TOLERANCE
    assert {s.dtype for s in (*fp16.inputs, *fp16.outputs)} == {"float32"}
    assert fp16.details["operators"]["cast"] == 4  # two inputs, two outputs


@pytest.mark.parametrize("variant", ["vision", "causal", "lra", "mobile"])
def test_every_kind_of_variant_converts(variant: str, tmp_path: Path) -> None:
    artifact = TARGET.convert(layer_program(variant), Options(), tmp_path)
    feeds = layer_feeds()
    with interpreted(artifact) as session:
        result = session.run(feeds)
    assert largest_error(result, truth(layer(variant), feeds)) <= FP32_TOLERANCE
    assert "inverse" not in artifact.details["operators"]


def test_names_shapes_labels_and_versions_are_in_the_package(fp32: Artifact) -> None:
    found = TARGET.inspect(fp32.path)
    assert [TensorSpec.from_json(s) for s in found["inputs"]] == list(fp32.inputs)
    assert [TensorSpec.from_json(s) for s in found["outputs"]] == list(fp32.outputs)
    assert fp32.inputs == tuple(s.static() for s in INPUTS)
    assert found["labels"] == list(LABELS)
    assert found["metadata"]["preprocessing"] == {"scale": 0.5}
    assert found["metadata"]["recipe_sha256"] == "cd" * 32
    assert found["metadata"]["toolchain"] == dict(fp32.toolchain)
    assert found["fusions"] == {"FlowAttention": 0}
    assert found["operators"] == fp32.details["operators"]
    assert found["operators"]["matmul"] >= 2 and "const" not in found["operators"]


def test_manifest_names_every_part_once(fp32: Artifact) -> None:
    manifest = json.loads((fp32.path / "Manifest.json").read_text())
    entries = manifest["itemInfoEntries"]
    assert entries[manifest["rootModelIdentifier"]]["name"] == "model.mlmodel"
    assert {e["path"] for e in entries.values()} == {
        "com.apple.CoreML/model.mlmodel",
        "com.apple.CoreML/weights",
    }
    parts = {p.relative_to(fp32.path).as_posix() for p in fp32.path.rglob("*") if p.is_file()}
    assert parts == {package.MANIFEST_FILE, package.MODEL_FILE, package.WEIGHTS_FILE}


def test_deployment_target_sets_the_specification(tmp_path: Path, fp32: Artifact) -> None:
    newer = TARGET.convert(
        layer_program("vision"), Options(extra={"deployment_target": "iOS17"}), tmp_path
    )
    versions = [package.read_spec(a.path).specificationVersion for a in (fp32, newer)]
    assert versions == [7, 8]  # iOS 16 and iOS 17


def test_what_was_built_before_leaves_no_trace(fp32: Artifact, tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(2,))])
    def unrelated(x):
        return Builder.add(x=x, y=Builder.const(val=np.ones(2, np.float32)))

    again = TARGET.convert(layer_program("timeseries"), Options(), tmp_path)
    assert again.sha256 == fp32.sha256


class Reciprocal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.0 / torch.sigmoid(x)


def test_reciprocal_is_divided_exactly(tmp_path: Path) -> None:
    program = lower(Reciprocal(), [TensorSpec("x", ("batch", 4))], ["y"], name="one", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    x = np.array([[-9.0, -3.0, 0.0, 4.0]], np.float32)
    with interpreted(artifact) as session:
        result = session.run({"x": x})["y"]
    # 1/(x + 1e-4) would be wrong by half at x = -9.
    np.testing.assert_allclose(result, 1 + np.exp(-x.astype(np.float64)), rtol=1e-6)
    assert "inverse" not in artifact.details["operators"]


@pytest.mark.parametrize("epsilon", [None, 1e-4, 0.0])
def test_rounding_inverse_is_found_and_refused(
    epsilon: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coremltools.converters.mil import Builder

    def inverse(x: float, y: object, name: str) -> object:
        extra = {} if epsilon is None else {"epsilon": np.float32(epsilon)}
        return Builder.inverse(x=y, name=name, **extra)

    monkeypatch.setattr(Builder, "real_div", staticmethod(inverse))
    program = lower(Reciprocal(), [TensorSpec("x", ("batch", 4))], ["y"], name="one", ops=())
    if epsilon == 0.0:
        TARGET.convert(program, Options(), tmp_path)
        return
    with pytest.raises(ConversionError, match=r"inverse \S+ has epsilon 0\.0001; expected 0"):
        TARGET.convert(program, Options(), tmp_path)


def test_alias_converts(tmp_path: Path) -> None:
    class Alias(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.alias(x) * 2

    program = lower(Alias(), [TensorSpec("x", ("batch", 3))], ["y"], name="alias", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    with interpreted(artifact) as session:
        assert session.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2, 2, 2]]


def test_dynamic_length_is_refused_before_any_work(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=1)

    spec = TensorSpec("x", ("batch", "length", 4))
    program = lower(Mean(), [spec], ["y"], name="mean", ops=())
    with pytest.raises(InputError, match=r"x has dynamic dimension 'length' \(axis 1\)"):
        TARGET.convert(program, Options(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(extra={"deployment_tarjet": "iOS17"}), "did you mean 'deployment_target'"),
        (Options(extra={"deployment_target": "iOS12"}), "'iOS12'; expected one of: iOS16"),
        (Options(extra={"compute_units": "gpu"}), "'gpu'; expected one of: all"),
        (Options(extra={"form": 3}), "form is 3"),
        (Options("int8"), "precision is 'int8'; expected one of: fp32, fp16"),  # type: ignore[arg-type]
    ],
)
def test_unusable_options_are_refused(options: Options, message: str) -> None:
    with pytest.raises(FlowExportError, match=message) as caught:
        TARGET.validate(options)
    assert caught.value.exit_code == 2


def test_input_dtype_that_core_ml_lacks_is_refused(tmp_path: Path) -> None:
    class Count(nn.Module):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return mask.float().sum(dim=1)

    spec = TensorSpec("mask", ("batch", 5), "bool")
    program = lower(Count(), [spec], ["count"], name="count", ops=())
    with pytest.raises(InputError, match="mask has dtype bool; expected one of: float32"):
        TARGET.convert(program, Options(), tmp_path)


def test_integers_of_64_bits_are_narrowed_at_the_border(tmp_path: Path) -> None:
    spec = TensorSpec("ids", ("batch", 5), "int64")
    torch.manual_seed(0)
    module = nn.Embedding(7, 4).eval()
    program = lower(module, [spec], ["vectors"], name="ids", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    ids = np.array([[0, 6, 3, 3, 1]], np.int64)
    with TARGET.load(artifact) as session:
        got = session.run({"ids": ids})["vectors"]
        with pytest.raises(InputError, match="expected int32 ones"):
            session.run({"ids": ids + 2**40})
    np.testing.assert_array_equal(got, module(torch.from_numpy(ids)).detach().numpy())


def test_operator_without_a_translation_is_told_in_one_line(tmp_path: Path) -> None:
    class Determinant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    program = lower(Determinant(), [TensorSpec("x", ("batch", 4, 4))], ["y"], name="det", ops=())
    with pytest.raises(ConversionError, match="coremltools refused the program") as caught:
        TARGET.convert(program, Options(), tmp_path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("part", [package.MANIFEST_FILE, package.MODEL_FILE, package.WEIGHTS_FILE])
@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_damaged_package_is_told(
    part: str, share: float | None, fp32: Artifact, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mlpackage"
    shutil.copytree(fp32.path, broken)
    content = (broken / part).read_bytes()
    if share is None:
        (broken / part).unlink()
    else:
        (broken / part).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="inspect coreml"):
        TARGET.inspect(broken)


def test_other_paths_are_no_packages(tmp_path: Path) -> None:
    file = tmp_path / "model.mlpackage"
    file.write_bytes(b"no package")
    for path in (file, tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match="inspect coreml"):
            TARGET.inspect(path)


@pytest.mark.skipif(platform.system() == "Darwin", reason="this machine has Core ML")
def test_session_elsewhere_is_interpreted_and_says_so(fp32: Artifact) -> None:
    available = TARGET.probe()
    assert available.converts and available.runs
    assert available.reason is not None and "interpreted" in available.reason
    with TARGET.load(fp32) as session:
        assert session.info.execution == "interpreted"
        assert session.info.label.endswith("(interpreted)")
        assert session.info.details["mode"] == "exact"


@pytest.mark.skipif(platform.system() != "Darwin", reason="needs Core ML, that is macOS")
def test_core_ml_itself_computes_what_torch_does(fp32: Artifact) -> None:
    artifact = replace(fp32, options={"compute_units": "cpu_only"})
    feeds = layer_feeds()
    with TARGET.load(artifact) as session:
        result = session.run(feeds)
    assert largest_error(result, truth(layer("timeseries"), feeds)) <= FP32_TOLERANCE


def test_second_conversion_replaces_the_first(tmp_path: Path, fp32: Artifact) -> None:
    stale = tmp_path / fp32.path.name / "stale.bin"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    again = TARGET.convert(layer_program("timeseries"), Options(), tmp_path)
    assert not stale.exists()
    assert (again.sha256, again.size_bytes) == (sha256_tree(again.path), size_tree(fp32.path))
    assert again.sha256 == fp32.sha256
