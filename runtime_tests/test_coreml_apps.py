"""Core ML packages as an app takes them: classifier, image, metadata, float32 islands."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mobile_models import LABELS, layer_feeds, layer_program
from torch import nn

from flowexport.core.errors import (
    FlowExportError,
    InputError,
    VerificationError,
)
from flowexport.core.pixels import Pixels
from flowexport.core.types import Artifact, Options, Precision, TensorSpec
from flowexport.lowering import LoweredProgram, lower
from flowexport.targets.coreml import TARGET, package
from flowexport.targets.coreml.interpreter import Interpreter, InterpreterSession

pytest.importorskip("coremltools", reason="needs flowexport[coreml]")

RNG = np.random.default_rng(11)
PREPROCESSING = {
    "layout": "NCHW, RGB",
    "range": [0.0, 1.0],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


class Picture(nn.Module):
    """Convolution with padding, pooling, scores; ``first`` stands before the convolution."""

    def __init__(self, channels: int, first: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = first or nn.Identity()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, len(LABELS))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.gelu(self.conv(self.first(image))).mean((2, 3)))


def picture_program(
    channels: int = 3, first: nn.Module | None = None, **changes: Any
) -> LoweredProgram:
    arguments: dict[str, Any] = {
        "name": "picture",
        "ops": (),
        "labels": LABELS,
        "preprocessing": PREPROCESSING,
        "recipe_sha256": "ab" * 32,
        **changes,
    }
    spec = TensorSpec("image", ("batch", channels, 8, 6))
    return lower(Picture(channels, first).eval(), [spec], ["logits"], **arguments)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    options = Options(
        extra={
            "classifier": True,
            "image": True,
            "metadata": {
                "author": "A. Body",
                "license": "MIT",
                "description": "three gestures",
                "version": "2.1",
                "inputs": {"image": "a hand"},
                "outputs": {"logits": "raw scores"},
                "user": {"com.example.team": "gestures"},
            },
        }
    )
    return TARGET.convert(picture_program(), options, tmp_path_factory.mktemp("app"))


def test_image_package_takes_the_pixels_that_the_tensor_package_takes_as_values(
    app: Artifact, tmp_path: Path
) -> None:
    pixels = RNG.integers(0, 256, (8, 6, 3), dtype=np.uint8)
    spec = TensorSpec("image", (1, 3, 8, 6))
    values = Pixels.of(PREPROCESSING, spec, "test").values(pixels.transpose(2, 0, 1)[None])
    with torch.no_grad():
        want = Picture(3).eval().double()(torch.from_numpy(values).double()).numpy()
    tensors = TARGET.convert(picture_program(), Options(), tmp_path)
    as_values = Interpreter(tensors.path).run({"image": values})["logits"]
    as_pixels = Interpreter(app.path).run({"image": pixels})
    scale = np.abs(want).max()
    assert np.abs(as_values - want).max() <= 1e-6 * scale
    assert np.abs(as_pixels["logits"] - want).max() <= 1e-6 * scale
    # The session gives the same for the bundle's tensors, and does not swallow a wrong pixel.
    with TARGET.load(app) as session:
        again = session.run({"image": values})["logits"]
        other = session.run({"image": values + 0.1})["logits"]
    assert np.abs(again - want).max() <= 1e-6 * scale
    assert np.abs(other - want).max() > 1e-3 * scale


def test_std_is_folded_into_the_first_convolution(app: Artifact) -> None:
    image = app.details["image"]
    assert image["std_folded_into"] == "conv" and image["color"] == "RGB"
    assert image["scale"] == pytest.approx(1 / 255)
    assert image["bias"] == pytest.approx([-0.485, -0.456, -0.406])
    # The scale and bias of the image alone: nothing else was added.
    assert app.details["operators"]["mul"] == 1 and app.details["operators"]["add"] == 1


@pytest.mark.parametrize(
    ("channels", "preprocessing", "first", "folded"),
    [
        (1, {"range": [0, 1], "mean": [0.0], "std": [1.0]}, None, ""),
        (1, {"range": [-1, 3], "mean": [0.25], "std": [0.5]}, None, ""),
        (3, PREPROCESSING, nn.Softplus(), None),
    ],
    ids=["grey", "grey, one std", "no convolution first"],
)
def test_other_images(
    channels: int, preprocessing: Any, first: nn.Module | None, folded: str | None, tmp_path: Path
) -> None:
    program = picture_program(channels, first, preprocessing=preprocessing)
    artifact = TARGET.convert(program, Options(extra={"image": True}), tmp_path)
    assert artifact.details["image"]["std_folded_into"] == folded
    pixels = RNG.integers(0, 256, (1, channels, 8, 6), dtype=np.uint8)
    spec = TensorSpec("image", (1, channels, 8, 6))
    values = Pixels.of(preprocessing, spec, "test").values(pixels)
    with torch.no_grad():
        want = Picture(channels, first).eval().double()(torch.from_numpy(values).double()).numpy()
    plane = pixels[0, 0] if channels == 1 else pixels[0].transpose(1, 2, 0)
    got = Interpreter(artifact.path).run({"image": plane})["logits"]
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_pixels_and_values_are_each_others_inverse() -> None:
    pixels = Pixels.of(PREPROCESSING, TensorSpec("image", ("batch", 3, 2, 2)), "test")
    whole = RNG.integers(0, 256, (2, 3, 2, 2), dtype=np.uint8)
    values = pixels.values(whole)
    np.testing.assert_array_equal(pixels.whole(values, "test"), whole)
    np.testing.assert_array_equal(pixels.nearest(values), values)
    beyond = pixels.nearest(values + 100)
    np.testing.assert_array_equal(pixels.whole(beyond, "test"), np.full_like(whole, 255))
    with pytest.raises(InputError, match=r"0\.\d+ pixels from the nearest 8-bit one"):
        pixels.whole(values + 0.005, "test")


def test_classifier_tells_label_and_probabilities(app: Artifact) -> None:
    assert app.outputs == (TensorSpec("logits", (1, 3)),)
    got = Interpreter(app.path).run({"image": np.zeros((8, 6, 3), np.uint8)})
    scores = got["logits"][0].astype(np.float64)
    powers = np.exp(scores - scores.max())
    assert list(got["classLabel_probs"]) == list(LABELS)
    np.testing.assert_allclose(
        list(got["classLabel_probs"].values()), powers / powers.sum(), atol=1e-6
    )
    assert got["classLabel"] == LABELS[int(scores.argmax())]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["wave", "clap", "rest"], "a probability is .* from the softmax of logits"),
        (["rest", "wave", "jump"], "the package's classes are .*; expected"),
    ],
)
def test_classes_of_another_order_are_found(
    app: Artifact, changed: list[str], message: str, tmp_path: Path
) -> None:
    damaged = tmp_path / app.path.name
    shutil.copytree(app.path, damaged)
    spec = package.read_spec(damaged)
    operation = next(o for o in package.operations(spec) if o.type == "classify")
    value = operation.inputs["classes"].arguments[0].value
    texts = value.immediateValue.list.values
    for text, new in zip(texts, changed, strict=True):
        text.immediateValue.tensor.strings.values[0] = new
    (damaged / package.MODEL_FILE).write_bytes(spec.SerializeToString())
    with (
        InterpreterSession(replace(app, path=damaged)) as session,
        pytest.raises(VerificationError, match=message),
    ):
        session.run({"image": RNG.normal(size=(1, 3, 8, 6)).astype(np.float32)})


def test_texts_are_in_the_package(app: Artifact) -> None:
    description = package.read_spec(app.path).description
    told = description.metadata
    assert (told.author, told.license, told.versionString) == ("A. Body", "MIT", "2.1")
    assert told.shortDescription == "three gestures"
    assert told.userDefined["com.example.team"] == "gestures"
    assert package.user_metadata(package.read_spec(app.path))["recipe_sha256"] == "ab" * 32
    texts = {f.name: f.shortDescription for f in (*description.input, *description.output)}
    assert texts["image"] == "a hand" and texts["logits"] == "raw scores"
    assert texts["classLabel"] and texts["classLabel_probs"]
    assert description.predictedFeatureName == "classLabel"


def test_texts_nobody_wrote_come_from_the_model(tmp_path: Path) -> None:
    artifact = TARGET.convert(picture_program(), Options(), tmp_path)
    description = package.read_spec(artifact.path).description
    assert description.metadata.versionString == "abababababab"
    assert "NCHW, RGB" in description.input[0].shortDescription
    assert "rest, wave, clap" in description.output[0].shortDescription


def test_results_know_their_modules(tmp_path: Path) -> None:
    artifact = TARGET.convert(layer_program("vision"), Options(), tmp_path)
    with InterpreterSession(artifact) as session:
        paths = {
            v.op_type: v.module_path for v in session.interpreter.run_with_values(layer_feeds())
        }
    assert paths["layer_norm"] == "norm" and paths["linear"] == "head"


# What stays in float32.


def half(keep: list[str], tmp_path: Path) -> Artifact:
    program = layer_program("vision", Precision.FP16)
    return TARGET.convert(program, Options(Precision.FP16, {"keep_fp32": keep}), tmp_path)


def test_named_operators_modules_and_the_attention_stay_in_float32(tmp_path: Path) -> None:
    artifact = half(["attention", "layer_norm", "head"], tmp_path)
    kept = artifact.details["kept_fp32"]["forward"]
    assert kept["attention"] > 20 and kept["layer_norm"] == 1 and kept["head"] == 1
    types: dict[str, set[str | None]] = {}
    with InterpreterSession(artifact, mode="fp16") as session:
        run = session.interpreter
        for value in run.run_with_values(layer_feeds()):
            types.setdefault(value.op_type, set()).add(run.declared_dtype(value.output_name))
    assert types["matmul"] == types["layer_norm"] == {"float32"}
    assert types["gelu"] == {"float16"} and types["linear"] == {"float16", "float32"}


def test_keeping_the_attention_in_float32_brings_the_result_nearer(tmp_path: Path) -> None:
    from mobile_models import largest_error, layer, truth

    want = truth(layer("vision"), layer_feeds())
    errors = []
    for keep in ([], ["attention", "layer_norm", "linear", "gelu"]):
        extra = {"keep_fp32": keep} if keep else {}
        program = layer_program("vision", Precision.FP16)
        artifact = TARGET.convert(
            program, Options(Precision.FP16, extra), tmp_path / str(len(keep))
        )
        with InterpreterSession(artifact, mode="fp16") as session:
            errors.append(largest_error(session.run(layer_feeds()), want))
    assert errors[1] < 0.8 * errors[0]


def test_a_rule_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"keep_fp32 has 'blocks\.9', which is no operator's type"):
        half(["attention", "blocks.9"], tmp_path)


# Bad input.


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"classifier": "yes"}, "classifier is 'yes'; expected true or false"),
        ({"image": 1}, "image is 1; expected true or false"),
        ({"layout": "nhwc"}, "unknown layout 'nhwc'; expected one of: ane, tokens"),
        ({"keep_fp32": ["head"]}, "keep_fp32 is .*, but the precision is fp32"),
        ({"keep_fp32": "head"}, "expected a list of different names"),
        ({"stateful": "split", "deployment_target": "iOS17"}, "iOS17; expected iOS18"),
        ({"stateful": "full"}, "unknown kind of state 'full'; expected one of: half, split"),
        ({"metadata": {"autor": "x"}}, "did you mean 'author'"),
        ({"metadata": {"author": 3}}, "author is 3; expected a text"),
        ({"metadata": {"inputs": "x"}}, "inputs is 'x'; expected names with texts"),
        ({"metadata": ["x"]}, "expected a mapping with: author"),
        ({"flexible": {"length": {"range": [8]}}}, "range is .*expected two lengths above 0"),
        ({"flexible": {"length": {"range": [8, 4]}}}, "expected two lengths above 0, increasing"),
        ({"flexible": {"length": [8, 4]}}, r"expected \{length"),
        ({"flexible": {"length": {"sizes": [4, 4]}}}, "expected two lengths or more"),
    ],
)
def test_unusable_options_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(FlowExportError, match=message) as caught:
        TARGET.validate(Options(extra=extra))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("program", "extra", "message"),
    [
        ({"labels": ()}, {"classifier": True}, "the model has no labels"),
        ({"labels": ("a", "b", "a")}, {"classifier": True}, "the label 'a' twice"),
        ({"labels": ("a", "b")}, {"classifier": True}, "logits has shape 1x3; expected 1x2"),
        ({"preprocessing": {}}, {"image": True}, "has no range, mean, std"),
        (
            {"preprocessing": {"range": [0, 1], "mean": [0.0], "std": [1.0]}},
            {"image": True},
            "expected 3 means",
        ),
        ({}, {"metadata": {"inputs": {"imago": "x"}}}, "did you mean 'image'"),
    ],
)
def test_models_that_cannot_have_these_ends_are_refused(
    program: dict[str, Any], extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FlowExportError, match=message) as caught:
        TARGET.convert(picture_program(**program), Options(extra=extra), tmp_path)
    assert caught.value.exit_code == 2


def test_image_of_a_model_with_two_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the inputs are x, padding_mask; expected one"):
        TARGET.convert(layer_program("vision"), Options(extra={"image": True}), tmp_path)
