"""TFLite: numbers, names, metadata, delegation and bad input on small models."""

from __future__ import annotations

import zipfile
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

from flowexport.core.errors import ConversionError, FlowExportError, InputError, LoweringError
from flowexport.core.types import Artifact, Options, Precision, TensorSpec
from flowexport.lowering import decompose, lower, specialise
from flowexport.measure_forms import layer as causal_layer
from flowexport.ops.installed import installed_ops
from flowexport.targets.tflite import TARGET, flatbuffer
from flowexport.targets.tflite.convert import to_flatbuffer
from flowexport.targets.tflite.reshapes import without_copies
from flowexport.targets.tflite.session import delegation, open_interpreter

pytest.importorskip("litert_torch", reason="needs flowexport[tflite]")

# float32 arithmetic of one layer: sums of up to 16 terms, some 1e-7 each.
FP32_TOLERANCE = 1e-5
# Weights rounded to 11 bits: 2^-11 = 4.9e-4 each, partly averaged out over 16 terms.
FP16_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("fp32")
    return TARGET.convert(layer_program("timeseries"), Options(Precision.FP32), out)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("fp16")
    program = layer_program("timeseries", Precision.FP16)
    return TARGET.convert(program, Options(Precision.FP16), out)


def test_fp32_equals_torch_and_the_check_can_fail(fp32: Artifact) -> None:
    feeds = layer_feeds()
    with TARGET.load(fp32) as session:
        result = session.run(feeds)
    assert largest_error(result, truth(layer("timeseries"), feeds)) <= FP32_TOLERANCE
    assert largest_error(result, truth(layer("vision"), feeds)) > 10 * FP32_TOLERANCE
    assert largest_error(result, truth(layer("timeseries", seed=6), feeds)) > 0.1
    assert largest_error(result, truth(layer("timeseries"), layer_feeds(2))) > 0.1


@pytest.mark.parametrize("variant", ["vision", "causal", "lra", "mobile"])
def test_every_kind_of_variant_converts(variant: str, tmp_path: Path) -> None:
    artifact = TARGET.convert(layer_program(variant), Options(), tmp_path)
    feeds = layer_feeds()
    with TARGET.load(artifact) as session:
        result = session.run(feeds)
        split = dict(session.info.details)
    assert largest_error(result, truth(layer(variant), feeds)) <= FP32_TOLERANCE
    assert {"serving_default": split} == artifact.details["delegation"]
    assert (split["partitions"] == 1 and not split["not_delegated"]) == (
        not artifact.details["warnings"]
    )
    if variant != "causal":
        assert split["partitions"] == 1


@pytest.mark.parametrize("tokens", [40, 64, 128])
def test_causal_chunks_convert_one_or_more(tokens: int, tmp_path: Path) -> None:
    module = causal_layer(tokens, 2, 4, "causal").eval()
    program = lower(
        module, [TensorSpec("x", (1, tokens, 8))], ["y"], name="layer", ops=installed_ops()
    )
    artifact = TARGET.convert(program, Options(extra={"form": "causal_chunked"}), tmp_path)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, tokens, 8), np.float32)}
    with TARGET.load(artifact) as session:
        result = session.run(feeds)
        assert session.info.details["partitions"] == 1
    with torch.no_grad():
        wanted = module.double()(torch.from_numpy(feeds["x"]).double()).numpy()
    assert np.abs(result["y"] - wanted).max() <= FP32_TOLERANCE * np.abs(wanted).max()


def test_no_operator_copies_what_it_could_read(tmp_path: Path) -> None:
    """As litert-torch writes it, and as finished: the same numbers from fewer copies."""
    form = "channel_first_sums"
    plain = decompose(layer_program("vision"), "tflite", installed_ops(), pinned=form)[0]
    paths = [tmp_path / name for name in ("before.tflite", "after.tflite")]
    paths[0].write_bytes(to_flatbuffer({"serving_default": specialise(plain, ())}))
    model = flatbuffer.read_model(paths[0])
    found = [flatbuffer.operator_counts(model)]
    without_copies(model)
    flatbuffer.write_model(model, paths[1], {})
    model = flatbuffer.read_model(paths[1])
    found.append(flatbuffer.operator_counts(model))
    assert found[1]["RESHAPE"] < found[0]["RESHAPE"]
    assert found[1]["TRANSPOSE"] < found[0]["TRANSPOSE"]
    assert {n: c for n, c in found[1].items() if n not in ("RESHAPE", "TRANSPOSE")} == {
        n: c for n, c in found[0].items() if n not in ("RESHAPE", "TRANSPOSE")
    }
    for graph, op, name in flatbuffer.operators(model):
        if name == "FULLY_CONNECTED" and len(graph.tensors[op.inputs[0]].shape) == 3:
            assert op.builtinOptions.keepNumDims
        assert name != "SUM" or op.builtinOptions.keepDims
    touched = {
        int(i) for g, op, _ in flatbuffer.operators(model) for i in (*op.inputs, *op.outputs)
    }
    assert touched == set(range(len(model.subgraphs[0].tensors))), "a tensor that nothing touches"
    feeds, results = layer_feeds(), []
    for path in paths:
        interpreter = open_interpreter(path, 1)
        assert delegation(interpreter)["partitions"] == 1
        results.append(interpreter.get_signature_runner()(**feeds))
    wanted = truth(layer("vision"), feeds)
    assert all(largest_error(r, wanted) <= FP32_TOLERANCE for r in results)


def test_a_reduction_that_something_else_reads_stays_as_it_is(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total, mean = x.sum(dim=2) + 1.0, x.mean(dim=1)
            return total.unsqueeze(2) * x + mean.unsqueeze(1), mean

    program = lower(Sums(), [TensorSpec("x", (2, 6, 4))], ["y", "mean"], name="sums", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    kept = {
        name: op.builtinOptions.keepDims
        for _, op, name in flatbuffer.operators(flatbuffer.read_model(artifact.path))
        if name in ("SUM", "MEAN")
    }
    assert kept == {"SUM": True, "MEAN": False}, "the mean is a result"
    x = np.random.default_rng(0).standard_normal((2, 6, 4), np.float32)
    with TARGET.load(artifact) as session:
        result = session.run({"x": x})
    mean = x.mean(1)
    np.testing.assert_allclose(result["mean"], mean, atol=1e-6)
    wanted = (x.sum(2, keepdims=True) + 1) * x + mean[:, None]
    np.testing.assert_allclose(result["y"], wanted, atol=1e-5)


def test_operators_that_stay_outside_xnnpack_are_named(tmp_path: Path) -> None:
    class Prefix(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(torch.cumsum(torch.sigmoid(x), dim=1))

    program = lower(Prefix(), [TensorSpec("x", ("batch", 6, 4))], ["y"], name="prefix", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    split = dict(artifact.details["delegation"]["serving_default"])
    (outside,) = split.pop("outside")
    assert outside.startswith("CUMSUM ")
    assert split == {
        "delegate": "XNNPACK",
        "partitions": 2,
        "delegated": 2,
        "not_delegated": {"CUMSUM": 1},
    }
    (warning,) = artifact.details["warnings"]
    assert warning.startswith("serving_default runs in 2 XNNPACK partitions; outside: 1 CUMSUM (")
    assert TARGET.inspect_run(artifact.path)["delegation"] == artifact.details["delegation"]
    assert artifact.form == "none"


def test_fp16_rounds_the_weights_and_nothing_else(fp16: Artifact, fp32: Artifact) -> None:
    feeds = layer_feeds()
    with TARGET.load(fp16) as session:
        result = session.run(feeds)
    rounded = layer("timeseries").half().double()
    assert largest_error(result, truth(rounded, feeds)) <= FP32_TOLERANCE
    error = largest_error(result, truth(layer("timeseries"), feeds))
    assert FP32_TOLERANCE < error <= FP16_TOLERANCE
    assert {s.dtype for s in (*fp16.inputs, *fp16.outputs)} == {"float32"}
    stored = fp16.details["constant_bytes"]
    assert stored["float16"] == 2 * (16 * 48 + 16 * 3)  # qkv and head
    assert fp32.details["constant_bytes"].keys() == {"float32", "int32"}
    assert fp16.details["delegation"]["serving_default"]["partitions"] == 1
    assert "float32" in fp16.details["arithmetic"]


def test_names_shapes_and_labels_are_in_the_file(fp32: Artifact) -> None:
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
    # Lowering splits the fused qkv into three; with the output projection that makes four.
    assert found["operators"]["FULLY_CONNECTED"] == 4
    with zipfile.ZipFile(fp32.path) as archive:
        assert archive.testzip() is None
        assert archive.read("labels.txt") == b"rest\nwave\nclap\n"


def test_standard_metadata_describes_the_tensors(fp32: Artifact) -> None:
    """Read TFLITE_METADATA by the field numbers of metadata_schema.fbs."""
    from flatbuffers import encode, number_types
    from flatbuffers.table import Table

    model = flatbuffer.read_model(fp32.path)
    entry = next(m for m in model.metadata if m.name == b"TFLITE_METADATA")
    content = bytes(model.buffers[entry.buffer].data)
    assert content[4:8] == b"M001"
    root = Table(content, encode.Get(number_types.UOffsetTFlags.packer_type, content, 0))

    def at(table: Table, field: int) -> int:
        offset = table.Offset(4 + 2 * field)
        assert offset, f"field {field} is missing"
        return offset

    def text(table: Table, field: int) -> str:
        return str(table.String(table.Pos + at(table, field)).decode())

    def items(table: Table, field: int) -> list[Table]:
        offset = at(table, field)
        start = table.Vector(offset)
        return [
            Table(content, table.Indirect(start + 4 * i)) for i in range(table.VectorLen(offset))
        ]

    assert text(root, 0) == "layer-timeseries"
    (graph,) = items(root, 3)
    assert [text(t, 0) for t in items(graph, 2)] == ["x", "padding_mask"]
    outputs = items(graph, 3)
    assert [text(t, 0) for t in outputs] == ["logits", "tokens"]
    (labels,) = items(outputs[0], 6)
    assert text(labels, 0) == "labels.txt"
    kind = labels.Get(number_types.Int8Flags, labels.Pos + at(labels, 2))
    assert kind == 2  # TENSOR_AXIS_LABELS
    assert not outputs[1].Offset(4 + 2 * 6)


@pytest.mark.parametrize("precision", list(Precision))
def test_constants_are_aligned_as_the_schema_asks(
    precision: Precision, fp32: Artifact, fp16: Artifact
) -> None:
    from ai_edge_litert import schema_py_generated as schema

    content = (fp32 if precision is Precision.FP32 else fp16).path.read_bytes()
    model = schema.Model.GetRootAs(content, 0)
    checked = 0
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        if buffer.DataLength():
            table = buffer._tab
            assert table.Vector(table.Offset(4)) % 16 == 0
            assert buffer.Offset() == 0  # old runtimes do not know data outside the flatbuffer
            checked += 1
    assert checked > 5


def test_dynamic_length_is_refused_before_any_work(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=1)

    spec = TensorSpec("x", ("batch", "length", 4))
    program = lower(Mean(), [spec], ["y"], name="mean", ops=())
    with pytest.raises(InputError, match=r"x has dynamic dimension 'length' \(axis 1\)") as caught:
        TARGET.convert(program, Options(), tmp_path / "out")
    assert "bucket" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(extra={"fom": "published"}), "did you mean 'form'"),
        (Options(extra={"form": 3}), "form is 3"),
        (Options("int8"), "precision is 'int8'; expected one of: fp32, fp16"),  # type: ignore[arg-type]
    ],
)
def test_unusable_options_are_refused(options: Options, message: str) -> None:
    with pytest.raises(FlowExportError, match=message) as caught:
        TARGET.validate(options)
    assert caught.value.exit_code == 2


def test_unknown_form_names_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"'nonsense'; expected one of .*published"):
        TARGET.convert(layer_program("vision"), Options(extra={"form": "nonsense"}), tmp_path)


def test_operator_without_a_lowering_is_told_in_one_line(tmp_path: Path) -> None:
    class Determinant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    program = lower(Determinant(), [TensorSpec("x", ("batch", 4, 4))], ["y"], name="det", ops=())
    with pytest.raises(ConversionError, match="litert-torch refused the program") as caught:
        TARGET.convert(program, Options(), tmp_path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.97])
def test_truncated_file_is_told(share: float, fp32: Artifact, tmp_path: Path) -> None:
    content = fp32.path.read_bytes()
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="tflite"):
        TARGET.inspect(broken)
    if share < 0.9:  # behind the flatbuffer only the labels are lost: the hash tells
        with pytest.raises(InputError, match="tflite"):
            TARGET.load(replace(fp32, path=broken))


def test_file_of_another_model_is_refused(fp32: Artifact, tmp_path: Path) -> None:
    spec = TensorSpec("image", ("batch", 4))
    program = lower(nn.Linear(4, 2).eval(), [spec], ["score"], name="other", ops=())
    other = TARGET.convert(program, Options(), tmp_path)
    with pytest.raises(InputError, match=r"inputs \['image'\].*expected \['padding_mask', 'x'\]"):
        TARGET.load(replace(fp32, path=other.path))


def test_missing_file_is_told(fp32: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file"):
        TARGET.load(replace(fp32, path=tmp_path / "gone.tflite"))


def test_threads_are_recorded(fp32: Artifact) -> None:
    feeds = layer_feeds()
    with TARGET.load(fp32, threads=2) as two, TARGET.load(fp32) as one:
        assert (two.info.threads, one.info.threads) == (2, 1)
        a, b = two.run(feeds), one.run(feeds)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_64_bit_inputs_keep_their_type(tmp_path: Path) -> None:
    spec = TensorSpec("ids", ("batch", 5), "int64")
    program = lower(nn.Embedding(7, 4).eval(), [spec], ["vectors"], name="ids", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    assert artifact.inputs[0].dtype == "int64"
    ids = np.array([[0, 6, 3, 3, 1]])
    with TARGET.load(artifact) as session:
        result = session.run({"ids": ids})["vectors"]
    wanted = program.exported.module()(torch.from_numpy(ids).repeat(2, 1))[:1]
    np.testing.assert_array_equal(result, wanted.detach().numpy())
