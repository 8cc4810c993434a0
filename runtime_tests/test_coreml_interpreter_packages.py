"""Packages as apps use them, interpreted: classifier, image, flexible shapes, compressed
weights, states, functions; and packages that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ct = pytest.importorskip("coremltools", reason="coremltools is not installed")

import coremltools.optimize.coreml as cto  # noqa: E402
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import types  # noqa: E402

from flowexport.core.errors import ConversionError, InputError, UnknownNameError  # noqa: E402
from flowexport.core.types import Artifact, Precision, TensorSpec  # noqa: E402
from flowexport.targets.coreml.interpreter import Interpreter, InterpreterSession  # noqa: E402
from flowexport.targets.coreml.interpreter import machine as machine_module  # noqa: E402

RNG = np.random.default_rng(3)
WEIGHT = RNG.normal(size=(48, 32)).astype(np.float32)
ROWS = RNG.normal(size=(5, 32)).astype(np.float32)


def save(model: Any, path: Path) -> Path:
    model.save(str(path))
    return path


def from_torch(module: nn.Module, example: tuple[int, ...], **options: Any) -> Any:
    traced = torch.jit.trace(module.eval(), torch.zeros(example))
    defaults: dict[str, Any] = {
        "compute_precision": ct.precision.FLOAT32,
        "minimum_deployment_target": ct.target.iOS16,
        "skip_model_load": True,
    }
    return ct.convert(traced, convert_to="mlprogram", **{**defaults, **options})


def from_builder(
    block: Callable[..., Any], specs: list[Any], target: Any = ct.target.iOS18, **options: Any
) -> Any:
    program = mb.program(input_specs=specs, opset_version=target)(block)
    return ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        minimum_deployment_target=target,
        skip_model_load=True,
        **options,
    )


def linear_model(target: Any = ct.target.iOS16) -> Any:
    return from_builder(
        lambda x: mb.linear(x=x, weight=WEIGHT, name="y"), [mb.TensorSpec((5, 32))], target
    )


def artifact_of(path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Any:
    return Artifact(
        target="coreml",
        path=path,
        sha256="",
        size_bytes=0,
        precision=Precision.FP32,
        model="small",
        recipe_sha256="",
        form="none",
        inputs=inputs,
        outputs=outputs,
    )


# Features.


class Probabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).softmax(-1)


def test_classifier_gives_label_and_probabilities(tmp_path: Path) -> None:
    module = Probabilities()
    labels = ["zero", "one", "two"]
    model = from_torch(
        module,
        (1, 4),
        inputs=[ct.TensorType(name="x", shape=(1, 4))],
        classifier_config=ct.ClassifierConfig(labels),
    )
    path = save(model, tmp_path / "m.mlpackage")
    interpreter = Interpreter(path)
    x = RNG.normal(size=(1, 4)).astype(np.float32)
    got = interpreter.run({"x": x})
    want = module(torch.from_numpy(x)).detach().numpy()[0]
    probabilities = next(v for v in got.values() if isinstance(v, dict))
    assert got["classLabel"] == labels[int(want.argmax())]
    assert list(probabilities) == labels
    np.testing.assert_allclose(list(probabilities.values()), want, rtol=1e-6)
    named = {f.name: f for f in interpreter.outputs}
    assert named["classLabel"].kind == "label"


class FirstLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image)


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_image_input_takes_pixels(tmp_path: Path, layout: str) -> None:
    module = FirstLayer()
    image = ct.ImageType(
        name="image",
        shape=(1, 3, 8, 6),
        scale=1 / 255,
        bias=[-0.1, 0.2, 0.3],
        color_layout=getattr(ct.colorlayout, layout),
    )
    model = from_torch(module, (1, 3, 8, 6), inputs=[image], outputs=[ct.TensorType(name="y")])
    interpreter = Interpreter(save(model, tmp_path / "m.mlpackage"))
    pixels = RNG.integers(0, 256, (8, 6, 3), dtype=np.uint8)
    ordered = pixels if layout == "RGB" else pixels[:, :, ::-1].copy()
    planes = torch.from_numpy(ordered).permute(2, 0, 1)[None].float()
    want = module(planes / 255 + torch.tensor([-0.1, 0.2, 0.3])[:, None, None]).detach().numpy()
    np.testing.assert_allclose(interpreter.run({"image": pixels})["y"], want, rtol=0, atol=2e-6)
    same = interpreter.run({"image": planes.numpy()})["y"]
    np.testing.assert_allclose(same, want, rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="image has 1 channels; expected 3"):
        interpreter.run({"image": pixels[:, :, 0]})


class OverTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(1) * x.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("shape", "allowed", "refused", "words"),
    [
        (lambda: (1, ct.RangeDim(2, 16, default=8), 4), (2, 9, 16), (1, 17), "1x2..16x4"),
        (
            lambda: ct.EnumeratedShapes([(1, 8, 4), (1, 12, 4)], default=(1, 8, 4)),
            (8, 12),
            (9,),
            "one of 1x8x4, 1x12x4",
        ),
    ],
    ids=["RangeDim", "EnumeratedShapes"],
)
def test_flexible_shapes(
    tmp_path: Path, shape: Any, allowed: tuple[int, ...], refused: tuple[int, ...], words: str
) -> None:
    inputs = [ct.TensorType(name="x", shape=shape())]
    model = from_torch(OverTokens(), (1, 8, 4), inputs=inputs, outputs=[ct.TensorType(name="y")])
    interpreter = Interpreter(save(model, tmp_path / "m.mlpackage"))
    for tokens in allowed:
        x = RNG.normal(size=(1, tokens, 4)).astype(np.float32)
        want = OverTokens()(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(interpreter.run({"x": x})["y"], want, rtol=1e-5, atol=1e-6)
    for tokens in refused:
        with pytest.raises(InputError, match=words.replace(".", r"\.")):
            interpreter.run({"x": np.zeros((1, tokens, 4), np.float32)})


# Compressed weights.

COMPRESSIONS: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "affine int8": (
        "constexpr_affine_dequantize",
        ct.target.iOS16,
        lambda m: cto.linear_quantize_weights(
            m, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=0))
        ),
    ),
    "blockwise int4": (
        "constexpr_blockwise_shift_scale",
        ct.target.iOS18,
        lambda m: cto.linear_quantize_weights(
            m,
            cto.OptimizationConfig(
                cto.OpLinearQuantizerConfig(
                    dtype="int4", granularity="per_block", block_size=16, weight_threshold=0
                )
            ),
        ),
    ),
    "palette of 16, iOS16": (
        "constexpr_lut_to_dense",
        ct.target.iOS16,
        lambda m: cto.palettize_weights(
            m, cto.OptimizationConfig(cto.OpPalettizerConfig(nbits=4, weight_threshold=0))
        ),
    ),
    "grouped palettes of 4, iOS18": (
        "constexpr_lut_to_dense",
        ct.target.iOS18,
        lambda m: cto.palettize_weights(
            m,
            cto.OptimizationConfig(
                cto.OpPalettizerConfig(
                    nbits=2, granularity="per_grouped_channel", group_size=16, weight_threshold=0
                )
            ),
        ),
    ),
    "sparse": (
        "constexpr_sparse_to_dense",
        ct.target.iOS16,
        lambda m: cto.prune_weights(
            m,
            cto.OptimizationConfig(
                cto.OpMagnitudePrunerConfig(target_sparsity=0.75, weight_threshold=0)
            ),
        ),
    ),
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressed_weights(tmp_path: Path, kind: str) -> None:
    operator, target, compress = COMPRESSIONS[kind]
    compressed = compress(linear_model(target))
    path = save(compressed, tmp_path / "small.mlpackage")
    dense = Interpreter(save(cto.decompress_weights(compressed), tmp_path / "dense.mlpackage"))
    body = ct.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram
    found = {op.type for b in body.functions["main"].block_specializations.values()
             for op in b.operations}  # fmt: skip
    assert operator in found
    got = Interpreter(path).run({"x": ROWS})["y"]
    np.testing.assert_array_equal(got, dense.run({"x": ROWS})["y"])
    exact = ROWS @ WEIGHT.T
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.6  # lossy, and yet this weight matrix


# States and functions.


def accumulator() -> Any:
    def block(x: Any, memory: Any) -> Any:
        total = mb.add(x=mb.read_state(input=memory), y=mb.cast(x=x, dtype="fp16"))
        kept = mb.coreml_update_state(state=memory, value=total)
        return mb.cast(x=kept, dtype="fp32", name="y")

    specs = [mb.TensorSpec((2, 3)), mb.StateTensorSpec((2, 3), types.fp16)]
    return from_builder(block, specs)


def test_states_live_between_runs(tmp_path: Path) -> None:
    path = save(accumulator(), tmp_path / "m.mlpackage")
    interpreter = Interpreter(path, mode="fp16")
    assert interpreter.operators["read_state"] == 1
    assert interpreter.operators["coreml_update_state"] == 1
    x = np.full((2, 3), 0.1, np.float32)
    states = interpreter.new_states()
    expected = np.zeros((2, 3), np.float16)
    for _ in range(5):
        got = interpreter.run({"x": x}, states=states)["y"]
        expected = expected + np.float16(0.1)
        np.testing.assert_array_equal(got, expected.astype(np.float32))
    # Without states every run starts at zeros.
    first = interpreter.run({"x": x})["y"]
    np.testing.assert_array_equal(first, np.full((2, 3), np.float16(0.1), np.float32))
    with pytest.raises(InputError, match="the states are"):
        interpreter.run({"x": x}, states={})


def test_session_keeps_and_resets_its_states(tmp_path: Path) -> None:
    path = save(accumulator(), tmp_path / "m.mlpackage")
    x, y = TensorSpec("x", (2, 3)), TensorSpec("y", (2, 3))
    with InterpreterSession(artifact_of(path, (x,), (y,))) as session:
        ones = {"x": np.ones((2, 3), np.float32)}
        assert session.run(ones)["y"][0, 0] == 1
        assert session.run(ones)["y"][0, 0] == 2
        session.reset_states()
        assert session.run(ones)["y"][0, 0] == 1
        assert session.info.execution == "interpreted"
        assert session.info.details["mode"] == "exact"
        assert "interpreted" in session.info.label


def test_functions_are_chosen_by_name(tmp_path: Path) -> None:
    descriptor = ct.utils.MultiFunctionDescriptor()
    for factor in (2.0, 3.0):

        def block(x: Any, *, factor: float = factor) -> Any:
            return mb.mul(x=x, y=np.float32(factor), name="y")

        model = from_builder(block, [mb.TensorSpec((4,))])
        path = save(model, tmp_path / f"{factor:g}.mlpackage")
        descriptor.add_function(str(path), "main", f"times_{factor:g}")
    descriptor.default_function_name = "times_2"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(descriptor, str(both))
    x = np.arange(4, dtype=np.float32)
    for name, factor in ((None, 2), ("times_2", 2), ("times_3", 3)):
        got = Interpreter(both, function=name).run({"x": x})["y"]
        np.testing.assert_array_equal(got, x * factor)
    with pytest.raises(UnknownNameError, match="times_2, times_3"):
        Interpreter(both, function="times_5")


# Refusals.


def test_feeds_that_do_not_fit_are_named(tmp_path: Path) -> None:
    interpreter = Interpreter(save(linear_model(), tmp_path / "m.mlpackage"))
    with pytest.raises(InputError, match=r"feeds are \['z'\]; expected \['x'\]"):
        interpreter.run({"z": ROWS})
    with pytest.raises(InputError, match="x has dtype float64; expected float32"):
        interpreter.run({"x": ROWS.astype(np.float64)})
    with pytest.raises(InputError, match="x has shape 4x32; expected 5x32"):
        interpreter.run({"x": ROWS[:4]})


def test_inverse_with_an_epsilon_is_refused(tmp_path: Path) -> None:
    model = from_builder(lambda x: mb.inverse(x=x, epsilon=1e-4, name="y"), [mb.TensorSpec((4,))])
    path = save(model, tmp_path / "m.mlpackage")
    with pytest.raises(ConversionError, match=r"inverse y \(block main.* has epsilon 0.0001"):
        Interpreter(path)


def test_an_operator_without_a_handler_is_refused(tmp_path: Path) -> None:
    model = from_builder(
        lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", name="y"),
        [mb.TensorSpec((1, 2, 4, 4))],
    )
    path = save(model, tmp_path / "m.mlpackage")
    with pytest.raises(ConversionError, match=r"does not know: l2_pool \(1\)"):
        Interpreter(path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda math, *, x, weight, bias: x @ weight.T[:, :-1],
            "has float32 5x47; expected float32 5x48",
        ),
        (lambda math, *, x, weight, bias: (x @ weight.T).double(), "has float64 5x48"),
        (lambda math, *, x, weight, bias: x @ weight, "failed: mat1 and mat2"),
        (lambda math, *, x, weight, bias: (x, x), "has 2 results; expected 1"),
    ],
    ids=["shape", "dtype", "exception", "count"],
)
def test_a_surprising_result_fails_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, words: str
) -> None:
    path = save(linear_model(), tmp_path / "m.mlpackage")
    monkeypatch.setattr(machine_module, "HANDLERS", {**machine_module.HANDLERS, "linear": wrong})
    interpreter = Interpreter(path, module_paths={"y": "head.classifier"}, model="small")
    with pytest.raises(ConversionError) as caught:
        interpreter.run({"x": ROWS})
    place = "interpret coreml small: linear y (block main, module head.classifier)"
    assert caught.value.message.startswith(place)
    assert words in caught.value.message


def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.mlpackage does not exist"):
        Interpreter(tmp_path / "nothing.mlpackage")
    path = save(linear_model(), tmp_path / "m.mlpackage")
    weights = next(path.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"m\.mlpackage"):
        Interpreter(path)
    next(path.rglob("*.mlmodel")).write_bytes(b"not a model")
    with pytest.raises(InputError, match="truncated or corrupt"):
        Interpreter(path)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mode is 'bf16'; expected one of"):
        Interpreter(tmp_path, mode="bf16")
