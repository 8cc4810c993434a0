"""The ONNX target: numbers, the function inside, metadata, reproducible bytes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_programs as programs
import onnxruntime
import pytest
import torch

from flowexport.core.errors import BundleError, ConversionError, FlowExportError, InputError
from flowexport.core.types import Artifact, Options, Precision
from flowexport.ops.descriptor import AttentionSite
from flowexport.ops.flow_attention import (
    VARIANTS,
    FlowVariant,
    causal,
    flow_attention_reference,
    op_arguments,
)
from flowexport.ops.flow_attention.lowered import FORMS
from flowexport.targets.onnx import TARGET
from flowexport.targets.onnx.function import body_of_any_size, body_of_this_size
from flowexport.targets.onnx.read import inline, operators

# Two attentions and three linears in fp32: sums of up to 48 terms of 6e-8 each.
FP32_TOLERANCE = 1e-5
# The same with 4.9e-4 a rounding; ONNX Runtime's CPU kernels round between fp32 islands.
FP16_TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("vision")
    return TARGET.convert(programs.program(programs.net("vision"), "net"), Options(), folder)


def run(artifact: Artifact, x: np.ndarray) -> np.ndarray:
    with TARGET.load(artifact) as session:
        return session.run({"x": x})["logits"]


QUICK = {"standard", "causal", "vision", "lra"}


@pytest.mark.parametrize(
    "variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_every_variant_in_fp32(variant: str, tmp_path: Path) -> None:
    module = programs.net(variant)
    shape = ("batch", "time", programs.WIDTH) if variant in ("standard", "causal") else None
    lowered = programs.program(module, variant, **({"shape": shape} if shape else {}))
    artifact = TARGET.convert(lowered, Options(), tmp_path)
    assert artifact.fusions == {"FlowAttention": 2}
    # One body for both nodes although their head counts and widths differ.
    assert artifact.details["functions"] == 1
    for batch, length in ((1, 12), (3, 12), *(((2, 70),) if shape else ())):
        x = programs.sample(batch, length)
        error = programs.relative(run(artifact, x), programs.truth(module, x))
        assert error <= FP32_TOLERANCE, f"batch {batch}, length {length}: {error}"


@pytest.mark.parametrize("variant", ["vision", "causal"])
def test_fp16_runs_with_float32_inputs(variant: str, tmp_path: Path) -> None:
    module = programs.net(variant)
    lowered = programs.program(module, variant, Precision.FP16)
    artifact = TARGET.convert(lowered, Options(Precision.FP16), tmp_path)
    model = onnx.load(artifact.path)
    weights = {w.data_type for w in model.graph.initializer if len(w.dims) > 1}
    assert weights == {onnx.TensorProto.FLOAT16}
    for batch in (1, 3):
        x = programs.sample(batch)
        result = run(artifact, x)
        assert result.dtype == np.float32
        assert programs.relative(result, programs.truth(module, x)) <= FP16_TOLERANCE


def test_node_is_what_a_plugin_expects(vision: Artifact) -> None:
    model = onnx.load(vision.path)
    nodes = [n for n in model.graph.node if n.op_type == "FlowAttention"]
    assert [n.name for n in nodes] == ["one", "two"]
    for node, heads in zip(nodes, (2, 4), strict=True):
        assert node.domain == "flowexport" and len(node.input) == 3 and len(node.output) == 1
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"flowexport"
        assert attributes["plugin_version"] == b"1"
        assert attributes["outer_eps"] == pytest.approx(1e-6)
        assert attributes["clamp"] == [-1.0, 1.0] and attributes["causal"] == 0
        shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
        dims = [d.dim_param or d.dim_value for d in shapes[node.output[0]]]
        assert dims == ["batch", programs.LENGTH, heads, programs.WIDTH // heads]
    assert {o.domain for f in model.functions for o in f.opset_import} == {""}


def test_without_the_function_nothing_runs(vision: Artifact, tmp_path: Path) -> None:
    model = onnx.load(vision.path)
    assert len(model.functions) == 1
    del model.functions[:]
    broken = dataclasses.replace(vision, path=tmp_path / "net.onnx")
    onnx.save(model, broken.path)
    assert TARGET.inspect(broken.path)["fusions"] == {}
    with pytest.raises(BundleError, match="FlowAttention"):
        TARGET.load(broken)


def test_a_changed_function_changes_the_result(vision: Artifact, tmp_path: Path) -> None:
    model = onnx.load(vision.path)
    clip = [n for n in model.functions[0].node if n.op_type == "Sigmoid"]
    clip[0].op_type = "Tanh"
    changed = dataclasses.replace(vision, path=tmp_path / "net.onnx")
    onnx.save(model, changed.path)
    x = programs.sample(2)
    assert programs.relative(run(changed, x), programs.truth(programs.net("vision"), x)) > 1e-3


@pytest.mark.parametrize("form", ["channel_first", "channel_first_sums", "token_major"])
def test_a_function_of_one_length_computes_no_sizes(form: str) -> None:
    """L / S is 1 there: a batch of any size would leave its arithmetic to every run."""

    def sizes(sources: int) -> set[str]:
        shapes = [("batch", n, 2, 8) for n in (12, sources, sources)]
        site = AttentionSite("FlowAttention", "one", *shapes, op_arguments(VARIANTS["vision"]))
        body = body_of_any_size(FORMS[form], site, torch.float32, 18)
        assert body is not None
        return {n.op_type for n in body.graph.node} & {"Shape", "Slice", "Expand"}

    assert sizes(12) == set() and sizes(20) == {"Shape", "Slice", "Expand"}


def test_checker_accepts_the_file_and_its_inlined_twin(vision: Artifact) -> None:
    model = onnx.load(vision.path)
    for candidate in (model, inline(model)):
        onnx.checker.check_model(candidate, full_check=True)
        onnx.shape_inference.infer_shapes(candidate, strict_mode=True, data_prop=True)
    x = programs.sample(2)
    session = onnxruntime.InferenceSession(inline(model).SerializeToString())
    assert programs.relative(session.run(None, {"x": x})[0], run(vision, x)) <= 1e-6


def test_metadata(vision: Artifact) -> None:
    found = TARGET.inspect(vision.path)
    metadata = found["metadata"]
    assert metadata["model"] == "net" and metadata["recipe_sha256"] == "cd" * 32
    assert json.loads(metadata["labels"]) == ["a", "b", "c", "ü"]
    assert json.loads(metadata["preprocessing"]) == {"scale": 0.5, "mean": [1, 2]}
    assert metadata["precision"] == "fp32" and metadata["form"] == vision.form
    assert metadata["torch_version"] == torch.__version__
    assert metadata["onnx_version"] == onnx.__version__
    assert found["inputs"] == [
        {"name": "x", "shape": ["batch", programs.LENGTH, programs.WIDTH], "dtype": "float32"}
    ]
    assert found["outputs"] == [s.to_json() for s in vision.outputs]
    assert found["operators"]["flowexport::FlowAttention"] == 2
    assert "flowexport::FlowAttention" not in found["operators_inlined"]
    assert sum(found["operators_inlined"].values()) == vision.details["nodes_inlined"]
    assert vision.details["nodes_inlined"] > vision.details["nodes"]


def test_attentions_are_recorded(vision: Artifact) -> None:
    sites = vision.details["attentions"]
    assert [s["module"] for s in sites] == ["one", "two"]
    assert all(s["form"] and s["reason"] for s in sites)
    assert {s["function"] for s in sites} == {"flowexport::FlowAttention"}


def test_file_tells_nothing_of_the_machine(vision: Artifact) -> None:
    data = vision.path.read_bytes()
    for secret in (str(Path(__file__).parent), sys.prefix, "stack_trace", "site-packages"):
        assert secret.encode() not in data


def test_two_variants_in_one_file(tmp_path: Path) -> None:
    module = programs.net("vision", "lra")
    artifact = TARGET.convert(programs.program(module, "mixed"), Options(), tmp_path)
    assert artifact.fusions == {"FlowAttention": 2} and artifact.details["functions"] == 2
    assert len({s["function"] for s in artifact.details["attentions"]}) == 2
    x = programs.sample(3)
    assert programs.relative(run(artifact, x), programs.truth(module, x)) <= FP32_TOLERANCE


def test_attention_without_onnx_attributes_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowexport.targets.onnx import target

    ops = tuple(dataclasses.replace(op, attributes=None) for op in target.installed_ops())
    monkeypatch.setattr(target, "installed_ops", lambda: ops)
    module = programs.net("vision")
    artifact = TARGET.convert(programs.program(module, "plain"), Options(), tmp_path)
    assert artifact.fusions == {"FlowAttention": 0} and artifact.details["functions"] == 0
    assert [s["function"] for s in artifact.details["attentions"]] == ["", ""]
    x = programs.sample(3)
    assert programs.relative(run(artifact, x), programs.truth(module, x)) <= FP32_TOLERANCE


def test_form_that_fixes_its_sizes_gets_a_function_a_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowexport.targets.onnx import target

    def fixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
        assert int(q.shape[2]) in (2, 4)  # int() makes torch.export specialise
        return reference(q, k, v, *rest)

    (op,) = target.installed_ops()
    reference = op.forms["published"]
    ops = (dataclasses.replace(op, forms={**op.forms, "fixed": fixed}),)
    monkeypatch.setattr(target, "installed_ops", lambda: ops)
    monkeypatch.setattr("flowexport.ops.installed.installed_ops", lambda: ops)
    module = programs.net("vision")
    lowered = programs.program(module, "fixed")
    artifact = TARGET.convert(lowered, Options(extra={"form": "fixed"}), tmp_path)
    assert artifact.fusions == {"FlowAttention": 2} and artifact.details["functions"] == 2
    for batch in (1, 3):
        x = programs.sample(batch)
        assert programs.relative(run(artifact, x), programs.truth(module, x)) <= FP32_TOLERANCE


@pytest.mark.parametrize("batch", [1, "batch"])
def test_long_causal_sequence_is_a_loop_where_the_batch_is_static(
    batch: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "SEGMENT", 2)
    # So wide a clamp that the largest exponent is carried too; 2 segments, padding in the last.
    variant = FlowVariant(clamp=(-40.0, 40.0), causal=True)
    arguments = op_arguments(variant)
    shapes = [(batch, 150, 2, size) for size in (3, 3, 4)]
    site = AttentionSite("FlowAttention", "", *shapes, arguments)
    body = body_of_this_size(FORMS["causal_scan"], site, torch.float32, opset=20)
    counts = operators(body)  # a loop's body counts
    assert (counts.get("Scan", 0), counts["MatMul"] > 30) == (
        (1, False) if batch == 1 else (0, True)
    )
    assert counts["MatMul"] > 12
    session = onnxruntime.InferenceSession(body.SerializeToString())
    size = 2 if batch == "batch" else 1
    tokens = [torch.randn(size, *shape[1:], dtype=torch.float64) * 3 for shape in shapes]
    truth = flow_attention_reference(*tokens, variant)
    feeds = {n: x.float().numpy() for n, x in zip("qkv", tokens, strict=True)}
    worst = np.abs(session.run(None, feeds)[0] - truth.numpy()).max()
    assert worst <= 2e-5 * truth.abs().max()  # float32 sums


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_bring_your_own_module(precision: Precision, tmp_path: Path) -> None:
    module = programs.Plain().eval()
    lowered = programs.program(module, "own", precision, ("batch", 3, 10))
    artifact = TARGET.convert(lowered, Options(precision), tmp_path)
    assert artifact.fusions == {} and artifact.form == "no attention"
    x = programs.sample(3, 3, 10)
    bound = FP32_TOLERANCE if precision is Precision.FP32 else FP16_TOLERANCE
    assert programs.relative(run(artifact, x), programs.truth(module, x)) <= bound


@pytest.mark.slow
def test_newest_opset_keeps_node_and_numbers(tmp_path: Path) -> None:
    module = programs.net("causal")
    lowered = programs.program(module, "opset")
    artifact = TARGET.convert(lowered, Options(extra={"opset": 23}), tmp_path)
    assert TARGET.inspect(artifact.path)["opset"]["ai.onnx"] == 23
    assert artifact.fusions == {"FlowAttention": 2}
    x = programs.sample(2)
    assert programs.relative(run(artifact, x), programs.truth(module, x)) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"opset": 19}, "20, 21, 22, 23"),
        ({"opset": "20"}, "20, 21, 22, 23"),
        ({"form": "publishd"}, "published"),
        ({"form": 3}, "published"),
        ({"opste": 20}, "opset"),
    ],
)
def test_unsupported_option_is_refused(extra: dict[str, object], named: str) -> None:
    with pytest.raises(FlowExportError, match=named) as caught:
        TARGET.validate(Options(extra=extra))
    assert caught.value.exit_code == 2


def test_unsupported_precision_is_refused() -> None:
    with pytest.raises(FlowExportError, match=r"int8.*fp16, fp32"):
        TARGET.validate(Options("int8"))  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "cut in half", "missing"])
def test_broken_file_is_named(damage: str, vision: Artifact, tmp_path: Path) -> None:
    data = vision.path.read_bytes()
    path = tmp_path / "net.onnx"
    if damage != "missing":
        contents = {"garbage": b"this is no model", "empty": b"", "cut": data[:-1]}
        path.write_bytes(contents.get(damage, data[: len(data) // 2]))
    with pytest.raises(InputError, match=r"net\.onnx"):
        TARGET.inspect(path)
    with pytest.raises(BundleError, match=r"net\.onnx"):
        TARGET.load(dataclasses.replace(vision, path=path))


def test_model_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowexport.targets.onnx import target

    monkeypatch.setattr(target, "MAX_BYTES", 100)
    lowered = programs.program(programs.Plain().eval(), "own", shape=("batch", 3, 10))
    with pytest.raises(ConversionError, match=r"weights have .* expected at most 100"):
        TARGET.convert(lowered, Options(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_session_says_what_it_is(vision: Artifact) -> None:
    with TARGET.load(vision, threads=2) as session:
        info = session.info
        assert (info.name, info.version) == ("onnxruntime", onnxruntime.__version__)
        assert info.threads == 2 and info.execution == "native"
        assert info.details["providers"] == ["CPUExecutionProvider"]
        for feeds in ({}, {"y": programs.sample(1)}, {"x": programs.sample(1, 11)}):
            with pytest.raises(InputError):
                session.run(feeds)


def test_availability() -> None:
    found = TARGET.probe()
    assert found.converts and found.runs and found.reason is None
    assert found.toolchain["onnxruntime"] == onnxruntime.__version__
