"""Quantised precisions: rules, their proof on finished files, calibration, accuracy as judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_contract_targets import expected, feeds, program

from flowexport.calibration import load_calibration, spread, write_samples
from flowexport.core.errors import ConversionError, InputError, UnknownNameError
from flowexport.core.findings import AccuracyResult
from flowexport.core.tolerances import Tolerance
from flowexport.core.types import Dataset, Options, Precision, TensorSpec
from flowexport.lowering.layers import Layer, LayerIndex, weighted_layers
from flowexport.lowering.quantisation import Treatment, decide, prove, treatment_of
from flowexport.plan import make_plan
from flowexport.recipes import Calibration, Recipe
from flowexport.recipes.recipe import ModelRef
from flowexport.registry import TARGETS
from flowexport.resolve import find_recipe
from flowexport.targets.onnx import TARGET as ONNX
from flowexport.targets.onnx.integer import safe_ranges, static
from flowexport.targets.onnx.quantise import INTEGER

RNG = np.random.default_rng(5)
WEIGHTS = {"a.fc": RNG.standard_normal((6, 4)), "b.qkv": RNG.standard_normal((12, 4))}
LAYERS = tuple(Layer(p, "linear", w.astype(np.float32)) for p, w in WEIGHTS.items())


def dataset(name: str = "tiny-train", samples: int = 8, classes: int = 2) -> Dataset:
    inputs = feeds(samples)
    return Dataset(name, inputs, np.arange(samples) % classes, ("a", "b"), "made here")


def recipe(**more: Any) -> Recipe:
    return Recipe(name="tiny", model=ModelRef(name="tiny"), **more)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.safetensors"
    write_samples(dataset(), path)
    return path


# What a layer's weight is known by


def test_a_weight_is_found_whatever_the_converter_did_to_it() -> None:
    index, w = LayerIndex(LAYERS), WEIGHTS["a.fc"]
    assert index.find(w) == ("a.fc",)
    assert index.find(w[:, [2, 0, 3, 1]]) == ("a.fc",), "another order of inputs"
    assert index.find(w * 11.3) == ("a.fc",), "a scale folded into it"
    assert index.find(w.astype(np.float16)) == ("a.fc",), "half precision"
    assert index.find(w * [1.1, 0.9, 1.05, 1.0]) == ("a.fc",), "a norm folded into it"
    assert index.find(WEIGHTS["b.qkv"][4:8]) == ("b.qkv",), "a third of a fused layer"
    assert index.find(np.concatenate([w, WEIGHTS["b.qkv"]])) == ("a.fc", "b.qkv"), "a merge"
    assert index.find(RNG.standard_normal((6, 4))) == (), "another model's"


def test_layers_of_a_program_in_order_with_their_paths() -> None:
    layers = weighted_layers(program(Precision.FP32))
    assert [(layer.path, layer.weight.shape) for layer in layers] == [
        ("qkv", (24, 8)),
        ("head", (3, 8)),
    ]


# Rules


def test_static_keeps_the_ends_and_what_the_user_names() -> None:
    layers = [replace(LAYERS[0], path=f"l.{i}") for i in range(4)]
    found = decide(layers, Precision.INT8_STATIC, ["l.2"], where="t")
    assert [d.treatment for d in found] == [
        Treatment.WEIGHTS,
        Treatment.INTEGER,
        Treatment.FLOAT,
        Treatment.WEIGHTS,
    ]
    assert [d.rule for d in found] == ["ends", "linear", "kept", "ends"]
    weights = decide(layers, Precision.PALETTE6, (), where="t")
    assert {d.treatment for d in weights} == {Treatment.WEIGHTS}
    # A merged operator of which one part is kept is kept whole.
    assert treatment_of(["l.1", "l.2"], found) is Treatment.FLOAT


def test_static_convolutions_of_more_than_one_element_store_weights() -> None:
    kinds = ("linear", "convolution", "pointwise", "depthwise", "linear")
    layers = [replace(LAYERS[0], path=f"l.{i}", kind=kind) for i, kind in enumerate(kinds)]
    found = decide(layers, Precision.INT8_STATIC, (), where="t")
    assert [d.rule for d in found] == ["ends", "convolution", "linear", "convolution", "ends"]
    found = decide(layers, Precision.INT8_DYNAMIC, (), where="t")
    assert {d.rule for d in found} == {"linear"}


def test_depthwise_layers_whose_runtime_has_no_dynamic_form_store_weights() -> None:
    layers = [replace(LAYERS[0], path=kind, kind=kind) for kind in ("depthwise", "convolution")]
    for precision, able, wanted in (
        (Precision.INT8_DYNAMIC, False, [Treatment.WEIGHTS, Treatment.INTEGER]),
        (Precision.INT8_DYNAMIC, True, [Treatment.INTEGER, Treatment.INTEGER]),
    ):
        found = decide(layers, precision, (), where="t", dynamic_depthwise=able)
        assert [d.treatment for d in found] == wanted


@pytest.mark.parametrize("keep, said", [(["x.*"], "names no linear"), (["a.fc", "b"], "all 2")])
def test_keep_float_that_means_nothing_is_refused(keep: list[str], said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        decide(LAYERS, Precision.INT8_WEIGHTS, keep, where="t")


def test_a_rule_that_the_file_does_not_follow_fails_the_conversion() -> None:
    decisions = decide(LAYERS, Precision.INT8_DYNAMIC, (), where="t")
    operators = {"a.fc": ("a.fc",), "b.qkv": ("b.qkv",)}
    prove(decisions, {"a.fc": "integer", "b.qkv": "integer"}, operators, "t")
    for found in ({"a.fc": "integer", "b.qkv": "float"}, {"a.fc": "integer"}):
        with pytest.raises(ConversionError, match=r"b\.qkv is (float|missing)"):
            prove(decisions, found, operators, "t")


# Files


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static", "int8-weights"])
def test_onnx_file_is_as_its_rules_say(precision: str, samples: Path, tmp_path: Path) -> None:
    options = Options(Precision(precision), {}, (), samples)
    artifact = ONNX.convert(program(Precision.FP32), options, tmp_path)
    model = onnx.load(artifact.path)
    inside = [n.op_type for f in model.functions for n in f.node]
    assert inside and not any("Quant" in op or "Integer" in op for op in inside)
    assert artifact.fusions == {"FlowAttention": 1}
    found = {e["path"]: e["found"] for e in artifact.details["quantisation"]["layers"]}
    integer = sum(n.op_type in INTEGER for n in model.graph.node)
    if precision == "int8-dynamic":
        assert found == {"qkv": "integer", "head": "integer"} and integer >= 2
    else:  # two layers: both are ends
        assert found == {"qkv": "weights", "head": "weights"} and integer == 0
    big = [i for i in model.graph.initializer if i.data_type == 1 and np.prod(i.dims) >= 24]
    assert not big, "a weight is left in float"


def test_keep_float_keeps_a_layer(samples: Path, tmp_path: Path) -> None:
    for options in (
        Options(Precision.INT8_DYNAMIC, {}, ("head",)),
        Options(Precision.INT8_WEIGHTS, {}, ("head",)),
    ):
        artifact = ONNX.convert(program(Precision.FP32), options, tmp_path)
        layers = {e["path"]: e for e in artifact.details["quantisation"]["layers"]}
        assert layers["head"]["found"] == "float" and layers["head"]["rule"] == "kept"
        assert layers["qkv"]["found"] != "float"


def test_no_pair_of_products_can_saturate_in_16_bits() -> None:
    """255 (a + b) fits for every neighbouring pair, where full-range weights break it."""
    weight = RNG.standard_normal((32, 5)).astype(np.float32)
    weight[0:2] = 3.0  # the two largest of each channel, neighbours of one sign
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    graph = onnx.helper.make_graph([node], "g", [], [], [onnx.numpy_helper.from_array(weight, "w")])
    ranges = safe_ranges(onnx.helper.make_model(graph), ["layer"])["w"]
    safe = np.rint(weight / (np.array([r["rmax"] for r in ranges]) / 127))
    full = np.rint(weight / (np.abs(weight).max(axis=0) / 127))
    assert 255 * np.abs(full[0::2] + full[1::2]).max() > 32767
    assert 255 * np.abs(safe[0::2] + safe[1::2]).max() <= 32767
    assert len(ranges) == 5 and all(r["axis"] == 1 for r in ranges)


def test_static_without_samples_is_refused(tmp_path: Path) -> None:
    plain = program(Precision.FP32)
    three = replace(plain, exported=plain.exported)
    with pytest.raises(ConversionError, match="calibration"):
        static(onnx.ModelProto(), ["x"], Options(Precision.INT8_STATIC), three, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, precision",
    [("tflite", "int8-dynamic"), ("tflite", "int8-weights"), ("coreml", "palette4")],
)
def test_other_targets_prove_their_rules_and_stay_close(
    name: str, precision: str, samples: Path, tmp_path: Path
) -> None:
    target = TARGETS.get(name)
    if not target.probe().converts:
        pytest.skip(str(target.probe().reason))
    options = Options(Precision(precision), {}, ("head",), samples)
    base = Precision.FP16 if name == "coreml" else Precision.FP32
    artifact = target.convert(program(base), options, tmp_path)
    layers = {e["path"]: e["found"] for e in artifact.details["quantisation"]["layers"]}
    wanted = "integer" if precision == "int8-dynamic" else "weights"
    assert layers == {"qkv": wanted, "head": "float"}
    truth = expected(feeds())
    with target.load(artifact) as session:
        result = session.run(feeds())
    # 16 values a tensor leave about 10 % of noise a layer, 8 bits about 1 %.
    limit = 0.3 if precision == "palette4" else 0.03
    for key, value in result.items():
        error = np.abs(value - truth[key]).max() / np.abs(truth[key]).max()
        assert 0 < error <= limit


def added(values: np.ndarray) -> Any:
    """Return a TFLite model of y = x + values, and of z = x with one scale for each channel."""
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, shape: list[int], buffer: int = 0) -> Any:
        made = schema.TensorT()
        made.name, made.shape, made.buffer = name.encode(), shape, buffer
        made.quantization = schema.QuantizationParametersT()
        return made

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.metadata = 3, []
    model.buffers = [schema.BufferT(), schema.BufferT()]
    model.buffers[1].data = values.view(np.uint8).ravel()
    code = schema.OperatorCodeT()
    code.version, code.builtinCode = 1, schema.BuiltinOperator.ADD
    model.operatorCodes = [code]
    graph.tensors = [
        tensor("x", [*values.shape]), tensor("c", [*values.shape], 1), tensor("y", [*values.shape])
    ]  # fmt: skip
    add = schema.OperatorT()
    add.inputs, add.outputs = [0, 1], [2]
    add.builtinOptionsType = schema.BuiltinOptions.AddOptions
    add.builtinOptions = schema.AddOptionsT()
    graph.operators, graph.inputs, graph.outputs = [add], [0], [2]
    model.subgraphs = [graph]
    ends = [schema.TensorMapT(), schema.TensorMapT()]
    for end, (name, index) in zip(ends, (("x", 0), ("y", 2)), strict=True):
        end.name, end.tensorIndex = name.encode(), index
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.inputs, signature.outputs = b"main", ends[:1], ends[1:]
    model.signatureDefs = [signature]
    return model


def test_large_tflite_constants_are_stored_in_half_and_small_ones_are_not(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    from flowexport.targets.tflite import flatbuffer
    from flowexport.targets.tflite.half import store_in_half
    from flowexport.targets.tflite.session import open_interpreter

    table = RNG.standard_normal((1, 32, 64)).astype(np.float32)
    small, huge = table[:, :, :8].copy(), table * 1e6
    for values, saved in ((table, table.size * 2), (small, 0), (huge, 0)):
        model, path = added(values), tmp_path / "m.tflite"
        told = store_in_half(model)
        assert told == {"constants": int(saved > 0), "bytes_saved": saved}
        flatbuffer.write_model(model, path, {})
        read = flatbuffer.read_model(path)
        assert flatbuffer.constant_bytes(read) == (
            {"float16": saved} if saved else {"float32": values.nbytes}
        )
        runner = open_interpreter(path, 1).get_signature_runner("main")
        wanted = values.astype(np.float16).astype(np.float32) if saved else values
        assert np.array_equal(runner(x=np.zeros_like(values))["y"], wanted)


def test_a_tflite_file_has_equal_vectors_once_and_reads_back_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    from flowexport.targets.tflite import flatbuffer

    sizes = {}
    for channels in (64, 1064):
        model = added(RNG.standard_normal((1, 2, 4)).astype(np.float32))
        for tensor in model.subgraphs[0].tensors:
            tensor.quantization.scale = np.linspace(1, 2, channels, dtype=np.float32)
            tensor.quantization.zeroPoint = np.zeros(channels, np.int64)
        path = tmp_path / f"{channels}.tflite"
        flatbuffer.write_model(model, path, {})
        sizes[channels] = path.stat().st_size
        read = flatbuffer.read_model(path).subgraphs[0]
        for tensor in read.tensors:
            assert list(tensor.shape) == [1, 2, 4]
            assert np.array_equal(
                tensor.quantization.scale, np.linspace(1, 2, channels, dtype=np.float32)
            )
            assert len(tensor.quantization.zeroPoint) == channels
        assert [list(o.inputs) for o in read.operators] == [[0, 1]]
    # 4 bytes of scale and 8 of zero point a channel, once for the three tensors.
    assert 12_000 <= sizes[1064] - sizes[64] < 12_100


# Calibration


def test_samples_are_spread_over_the_classes() -> None:
    targets = np.array([0] * 50 + [1] * 5 + [2] * 2)
    chosen = spread(targets, 9)
    assert list(np.bincount(targets[chosen])) == [4, 3, 2] and len(set(chosen)) == 9


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": np.zeros((8, 5, 8), np.float32)}, "shape 8x5x8"),
        ({"x": np.zeros((8, 6, 8))}, "dtype float64"),
        ({"x": np.full((8, 6, 8), np.nan, np.float32)}, "not finite"),
        ({"targets": np.zeros(8, np.int64)}, "class 0 only"),
        ({"targets": np.zeros(8)}, "targets float64"),
        ({"targets": None}, "no targets"),
        ({"gain": None}, "'gain' too"),
    ],
)
def test_calibration_data_that_do_not_fit(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arrays = {**feeds(8), "targets": np.arange(8) % 2, **change}
    path = tmp_path / "cal.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    inputs = (TensorSpec("x", ("batch", 6, 8)), TensorSpec("gain", ("batch", 6)))
    with pytest.raises(InputError, match=said):
        load_calibration(recipe(calibration=Calibration(file=path)), inputs, None)


def test_the_evaluation_set_does_not_calibrate(tmp_path: Path) -> None:
    path = tmp_path / "cal.npz"
    test = dataset("tiny-test", 20)
    some = {name: values[5:13] for name, values in test.inputs.items()}
    np.savez(path, targets=np.arange(8) % 2, **some)
    inputs = (TensorSpec("x", ("batch", 6, 8)), TensorSpec("gain", ("batch", 6)))
    with pytest.raises(InputError, match="is the evaluation set"):
        load_calibration(recipe(calibration=Calibration(file=path)), inputs, test)


def test_plans_refuse_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="palette4; expected one of") as caught:
        make_plan("digits", targets=["onnx"], precision="palette4", out=out)
    assert "--target coreml" in str(caught.value.fix)
    with pytest.raises(InputError, match="expected calibration samples"):
        make_plan("flowformer-vision-digits", targets=["onnx"], precision="int8-static", out=out)
    with pytest.raises(UnknownNameError, match="no-such-set"):
        make_plan(
            "digits", targets=["onnx"], precision="int8-static", calibration="no-such-set", out=out
        )
    with pytest.raises(InputError, match="is the evaluation set"):
        make_plan(
            "digits", targets=["onnx"], precision="int8-static", calibration="digits-test", out=out
        )
    kept = replace(find_recipe("digits"), keep_float=("blocks.9.*",))
    with pytest.raises(InputError, match="names no module"):
        make_plan(kept, targets=["onnx"], precision="int8-dynamic", out=out)
    with pytest.raises(InputError, match="expected points"):
        make_plan("digits", targets=["onnx"], max_accuracy_drop=101, out=out)
    assert not out.exists()


# Accuracy as judge


def result(lost: int, gained: int) -> AccuracyResult:
    correct = 367 - lost + gained
    return AccuracyResult("set", 370, 370, correct, 367, 370 - lost - gained, lost, gained)


def test_mcnemar_against_the_binomial_table() -> None:
    assert result(0, 0).p_value == 1.0
    assert result(5, 0).p_value == pytest.approx(2 / 2**5)
    assert result(1, 7).p_value == pytest.approx(2 * (1 + 8) / 2**8)
    assert result(3, 3).p_value == 1.0


def test_a_drop_above_the_limit_fails_with_the_test_told() -> None:
    limit = Tolerance(0.5, "as asked for", max_accuracy_drop=0.5)
    assert result(1, 0).violation(limit) is None  # 0.27 points
    said = result(3, 1).violation(limit)  # 0.54 points
    assert said is not None and "drops 0.54 points" in said and "McNemar p = 0.62" in said
