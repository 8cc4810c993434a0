"""Quantised files of several lengths, and of a classifier: what each function computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowexport_models import build_model
from test_buckets import SIZES, inputs

from flowexport.calibration import write_samples
from flowexport.core.errors import ConversionError
from flowexport.core.types import Dataset, Options, Precision
from flowexport.lowering import LoweredProgram, lower_buckets
from flowexport.lowering.layers import weighted_layers
from flowexport.lowering.quantisation import read_samples
from flowexport.ops.installed import installed_ops
from flowexport.registry import TARGETS

SHORT, LONG = 5, 12
LIMIT = 0.05
"""Of the largest score: 8 layers of 8 bits leave 0.5 to 2 %. ONNX with the ranges of the later
steps, which are a hundred times larger, leaves 12 %; TFLite 4 %, so its scales are read."""


def samples(count: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, LONG, 3)).astype(np.float32)
    x[:, SHORT:] *= 100
    real = np.where(np.arange(count) % 2, LONG, SHORT)[:, None]
    mask = (np.arange(LONG) < real).astype(np.float32)
    return {"x": x * mask[..., None], "padding_mask": mask}


def model() -> Any:
    torch.manual_seed(0)
    return build_model("flowformer-timeseries", **SIZES, num_layers=1, d_ff=16).eval()


@pytest.fixture(scope="module")
def program() -> LoweredProgram:
    return lower_buckets(
        model(),
        {n: inputs(n) for n in (SHORT, LONG)},
        ["logits"],
        name="tiny",
        ops=installed_ops(),
        labels=["a", "b", "c"],
    )


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "samples.safetensors"
    write_samples(Dataset("tiny", samples(), np.arange(16) % 3, (), "made here"), path)
    return path


def error(target: str, artifact: Any, length: int) -> float:
    """Return how far the scores of four samples are from float64's, over the largest."""
    # Every other sample is SHORT steps long, the others LONG.
    feeds = {n: v[int(length == LONG) :: 2, :length][:4] for n, v in samples().items()}
    with torch.no_grad():
        truth = model().double()(*(torch.from_numpy(v).double() for v in feeds.values())).numpy()
    with TARGETS.get(target).load(artifact) as session:
        rows = [{n: v[i : i + 1] for n, v in feeds.items()} for i in range(4)]
        found = np.concatenate([session.run(row)["logits"] for row in rows])
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def layers(artifact: Any) -> dict[str, str]:
    return {e["path"]: e["found"] for e in artifact.details["quantisation"]["layers"]}


def test_samples_are_cut_to_the_length_that_is_calibrated(calibration: Path) -> None:
    for length in (SHORT, LONG):
        name, found = read_samples(calibration, inputs(length))
        assert name == "tiny" and set(found) == {"x", "padding_mask"}
        for key, values in samples().items():
            assert np.array_equal(found[key], values[:, :length])


def test_onnx_calibrates_a_shorter_length_on_its_own_steps(
    program: LoweredProgram, calibration: Path, tmp_path: Path
) -> None:
    options = Options(Precision.INT8_STATIC, {}, (), calibration)
    short = program.functions[f"forward_{SHORT}"]
    artifact = TARGETS.get("onnx").convert(short, options, tmp_path)
    assert list(layers(artifact).values()) == ["weights", *["integer"] * 6, "weights"]
    assert 0 < error("onnx", artifact, SHORT) <= LIMIT


def test_tflite_signatures_have_ranges_of_their_own(
    program: LoweredProgram, calibration: Path, tmp_path: Path
) -> None:
    target = TARGETS.get("tflite")
    if not target.probe().converts:
        pytest.skip(str(target.probe().reason))
    options = Options(Precision.INT8_STATIC, {}, (), calibration)
    artifact = target.convert(program, options, tmp_path)
    assert list(layers(artifact).values()) == ["weights", *["integer"] * 6, "weights"]
    assert 0 < error("tflite", artifact.function(f"forward_{SHORT}"), SHORT) <= LIMIT
    from ai_edge_litert.schema_py_generated import TensorType

    from flowexport.targets.tflite import flatbuffer

    model = flatbuffer.read_model(artifact.path)
    scales = {
        s.signatureKey.decode(): max(
            float(t.quantization.scale[0])
            for t in model.subgraphs[s.subgraphIndex].tensors
            if t.type == TensorType.INT8 and len(t.quantization.scale) == 1  # activations
        )
        for s in model.signatureDefs
    }
    assert scales[f"forward_{LONG}"] > 10 * scales[f"forward_{SHORT}"] > 0


def test_tflite_signatures_of_other_layers_are_refused(program: LoweredProgram) -> None:
    from flowexport.targets.tflite.quantise import _all_layers

    short = program.functions[f"forward_{SHORT}"]
    found = _all_layers({"long": program, "short": short}, "t")
    assert len(found) == 9 and {a.path for a in found[7:]} == {"output_layer"}
    assert [a.weight.shape for a in found[7:]] == [(3, 8 * LONG), (3, 8 * SHORT)]
    tiny = LoweredProgram(
        "tiny", torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), (), (),
        Precision.FP32,
    )  # fmt: skip
    with pytest.raises(ConversionError, match="has 1 layers, the main one 8"):
        _all_layers({"long": program, "other": tiny}, "t")


def test_a_head_that_is_cut_to_a_length_is_kept_in_float_by_its_name(
    program: LoweredProgram, tmp_path: Path
) -> None:
    import onnx

    short = program.functions[f"forward_{SHORT}"]
    assert [a.path for a in weighted_layers(short)] == [a.path for a in weighted_layers(program)]
    keep = ("output_layer",)
    artifact = TARGETS.get("onnx").convert(
        program, Options(Precision.INT8_WEIGHTS, {}, keep), tmp_path
    )
    for name, length in (("", LONG), (f".forward_{SHORT}", SHORT)):
        model = onnx.load(artifact.path.with_name(f"tiny{name}.onnx"))
        types = {
            tuple(sorted(t.dims)): onnx.TensorProto.DataType.Name(t.data_type)
            for t in model.graph.initializer
            if len(t.dims) == 2
        }
        assert types[3, 8 * length].startswith("FLOAT")
        assert types[3, 8] == types[8, 16] == "INT8"


def test_coreml_functions_have_ranges_of_their_own(
    program: LoweredProgram, calibration: Path, tmp_path: Path
) -> None:
    target = TARGETS.get("coreml")
    if not target.probe().converts:
        pytest.skip(str(target.probe().reason))
    options = Options(Precision.INT8_STATIC, {}, (), calibration)
    artifact = target.convert(program, options, tmp_path)
    assert list(layers(artifact).values()) == ["weights", *["integer"] * 6, "weights"]
    from flowexport.targets.coreml.interpreter.program import load_package

    # Not LONG's: one range for steps that differ a hundredfold leaves 56 % (TFLite: 27 %).
    assert 0 < error("coreml", artifact.function(f"forward_{SHORT}"), SHORT) <= LIMIT
    largest = {}
    for length in (SHORT, LONG):
        operations = load_package(artifact.path, f"forward_{length}").function.operations
        scales = [float(op.scale.val) for op in operations if op.op_type == "quantize"]
        assert len(scales) == 4  # query, key and value share one
        largest[length] = max(scales)
    assert largest[LONG] > 10 * largest[SHORT] > 0


@pytest.mark.parametrize(
    "precision", [Precision.INT8_STATIC, Precision.INT8_WEIGHTS, Precision.PALETTE8]
)
def test_a_coreml_classifier_is_compressed(
    program: LoweredProgram, precision: Precision, calibration: Path, tmp_path: Path
) -> None:
    """The session holds label and probabilities against the scores, by the classes' names."""
    target = TARGETS.get("coreml")
    if not target.probe().converts:
        pytest.skip(str(target.probe().reason))
    short = program.functions[f"forward_{SHORT}"]
    artifact = target.convert(
        short, Options(precision, {"classifier": True}, (), calibration), tmp_path
    )
    assert artifact.details["classes"] == ["a", "b", "c"]
    assert artifact.details["operators"]["classify"] == 1
    inner = "integer" if precision is Precision.INT8_STATIC else "weights"
    assert list(layers(artifact).values()) == ["weights", *[inner] * 6, "weights"]
    assert 0 < error("coreml", artifact, SHORT) <= LIMIT
