"""TFLite for apps: channels last, 8-bit pixels, what standard tools read, older runtimes."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from torch import nn
from way_tools import refused

from flowexport.core.errors import ConversionError, InputError, UnavailableError, UnknownNameError
from flowexport.core.pixels import Pixels
from flowexport.core.types import Artifact, ModelSpec, Options, Precision, TensorSpec
from flowexport.lowering import lower
from flowexport.runners import RunnerTarget, prepare
from flowexport.targets.tflite import TARGET, flatbuffer, metadata
from flowexport.targets.tflite.compat import hybrid_channelwise, require_compatible
from flowexport.targets.tflite.session import informed

IMAGE = TensorSpec("image", ("batch", 3, 6, 8))
PREPROCESSING = {"range": [0.0, 1.0], "mean": [0.4, 0.5, 0.3], "std": [0.2, 0.25, 0.3]}


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.stem(image)).mean((2, 3)))


def model() -> Vision:
    torch.manual_seed(3)
    return Vision().eval()


def convert(out: Path, **extra: Any) -> Artifact:
    program = lower(
        model(),
        [IMAGE],
        ["logits"],
        name="vision",
        ops=(),
        labels=["a", "b", "c", "d"],
        preprocessing=PREPROCESSING,
    )
    return TARGET.convert(program, Options(extra=extra), out)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convert(tmp_path_factory.mktemp("app"), layout="nhwc", input_dtype="uint8")


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, 3, 6, 8)).astype(np.uint8)


def values() -> np.ndarray:
    return Pixels.of(PREPROCESSING, IMAGE, "test").values(pixels())


def truth() -> np.ndarray:
    with torch.no_grad():
        return model().double()(torch.from_numpy(values()).double()).numpy()


def test_pixels_channels_last_give_the_models_logits(app: Artifact) -> None:
    from ai_edge_litert.interpreter import Interpreter

    assert app.inputs == (TensorSpec("image", (1, 3, 6, 8)),), "the bundle's tensors stay"
    with TARGET.load(app) as session:
        found = session.run({"image": values()})["logits"]
        with pytest.raises(InputError, match=r"a value is .* pixels from the nearest 8-bit one"):
            session.run({"image": values() + 0.01})
    assert np.abs(found - truth()).max() <= 1e-5 * np.abs(truth()).max()
    # As an app calls it, without flowexport.
    runner = Interpreter(model_path=str(app.path)).get_signature_runner()
    plain = runner(image=np.ascontiguousarray(pixels().transpose(0, 2, 3, 1)))["logits"]
    assert np.array_equal(plain, found)
    (spec,), _ = flatbuffer.signature(flatbuffer.read_model(app.path))
    assert spec == TensorSpec("image", (1, 6, 8, 3), "uint8")
    split = app.details["delegation"]["serving_default"]
    assert split["partitions"] == 1 and split["not_delegated"] == {"CAST": 1}
    assert app.details["warnings"] == []


@pytest.mark.slow
def test_channels_last_alone_takes_floats(tmp_path: Path) -> None:
    artifact = convert(tmp_path, layout="nhwc")
    (spec,), _ = flatbuffer.signature(flatbuffer.read_model(artifact.path))
    assert spec == TensorSpec("image", (1, 6, 8, 3))
    with TARGET.load(artifact) as session:
        found = session.run({"image": values()})["logits"]
    assert np.abs(found - truth()).max() <= 1e-5 * np.abs(truth()).max()
    assert "CAST" not in artifact.details["operators"]
    model = flatbuffer.read_model(artifact.path)
    first = model.subgraphs[0].operators[0].opcodeIndex
    assert flatbuffer.operator_names(model)[first] == "CONV_2D", "no turn to NCHW and back"


class Table:
    """A table of a flatbuffer by slots, as ``metadata_schema.fbs`` numbers them."""

    def __init__(self, data: bytes, at: int | None = None) -> None:
        self.data = data
        self.at = struct.unpack_from("<I", data)[0] if at is None else at

    def field(self, slot: int) -> int:
        table = flatbuffers.table.Table(self.data, self.at)
        offset = table.Offset(4 + 2 * slot)
        assert offset, f"no slot {slot}"
        return self.at + offset

    def byte(self, slot: int) -> int:
        return self.data[self.field(slot)]

    def number(self, slot: int) -> int:
        return int(struct.unpack_from("<I", self.data, self.field(slot))[0])

    def _there(self, slot: int) -> int:
        place = self.field(slot)
        return place + int(struct.unpack_from("<I", self.data, place)[0])

    def table(self, slot: int) -> Table:
        return Table(self.data, self._there(slot))

    def tables(self, slot: int) -> list[Table]:
        start = self._there(slot)
        count = struct.unpack_from("<I", self.data, start)[0]
        places = [start + 4 + 4 * i for i in range(count)]
        return [Table(self.data, p + struct.unpack_from("<I", self.data, p)[0]) for p in places]

    def floats(self, slot: int) -> list[float]:
        start = self._there(slot)
        count = struct.unpack_from("<I", self.data, start)[0]
        return list(struct.unpack_from(f"<{count}f", self.data, start + 4))


def image_table(program_end: Any) -> Table:
    facts = metadata.image_facts([IMAGE], PREPROCESSING, program_end)
    data = metadata.metadata_buffer("m", "d", ["image"], ["logits"], "logits", facts)
    (graph,) = Table(data).tables(3)
    (tensor,) = graph.tables(2)
    return tensor


def test_metadata_tells_how_pixels_become_values() -> None:
    tensor = image_table(None)
    content = tensor.table(3)
    assert content.byte(0) == 2, "ImageProperties"
    size = content.table(1).table(1)
    assert content.table(1).byte(0) == 1 and (size.number(0), size.number(1)) == (8, 6)
    (unit,) = tensor.tables(4)
    assert unit.byte(0) == 1, "NormalizationOptions"
    mean, std = unit.table(1).floats(0), unit.table(1).floats(1)
    wide = pixels().astype(np.float64)[0]
    by_metadata = (wide - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(by_metadata, values()[0], rtol=1e-5, atol=1e-5)
    high, low = tensor.table(5).floats(0), tensor.table(5).floats(1)
    np.testing.assert_allclose(low, [-2, -2, -1], rtol=1e-6)
    np.testing.assert_allclose(high, [3, 2, 0.7 / 0.3], rtol=1e-6)


def test_metadata_of_a_pixel_input_asks_for_no_preprocessing(app: Artifact) -> None:
    model = flatbuffer.read_model(app.path)
    (entry,) = [m for m in model.metadata if m.name == metadata.BUFFER_NAME.encode()]
    (graph,) = Table(bytes(model.buffers[entry.buffer].data)).tables(3)
    (unit,) = graph.tables(2)[0].tables(4)
    assert unit.table(1).floats(0) == [0.0] * 3 and unit.table(1).floats(1) == [1.0] * 3
    found = TARGET.inspect(app.path)
    assert found["metadata"]["image"] == app.details["image"]
    assert found["labels"] == ["a", "b", "c", "d"]


def test_wrong_ends_are_told_before_any_long_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownNameError, match="unknown layout 'nwhc'; expected one of"):
        TARGET.validate(Options(extra={"layout": "nwhc"}))
    with pytest.raises(UnknownNameError, match="unknown input_dtype 'int8'"):
        TARGET.validate(Options(extra={"input_dtype": "int8"}))
    with pytest.raises(UnknownNameError, match=r"unknown compat 'tflite-2\.13'"):
        TARGET.validate(Options(extra={"compat": "tflite-2.13"}))
    spec = ModelSpec("v", None, (IMAGE,), preprocessing={"range": [0, 1]})
    with pytest.raises(InputError, match="has no mean, std; expected range, mean and std"):
        TARGET.check_model(spec, Options(extra={"input_dtype": "uint8"}), False)
    recipe = tmp_path / "jv.yaml"
    recipe.write_text(
        "schema: flowexport.recipe/1\nmodel: flowformer-timeseries-japanese-vowels\n"
        "targets:\n  tflite: {layout: nhwc}\n"
    )
    words = "layout nhwc and input_dtype float32 are asked for, but the inputs are x batchx29x12"
    arguments = ["convert", recipe, "--out", tmp_path / "out"]
    refused(capsys, 2, "jv.yaml:4: ", words, arguments=arguments)
    assert not (tmp_path / "out").exists()


def test_the_runtimes_greeting_stays_off_stderr(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="flowexport"), informed():
        os.write(2, b"INFO: Created a delegate.\nERROR: no memory\n")
    assert caplog.messages == ["Created a delegate."]
    assert capfd.readouterr().err == "ERROR: no memory\n"


@pytest.fixture(scope="module")
def quantised(app: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A linear layer whose channels differ, in float and in int8 by channel and by tensor."""
    import litert_torch
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.qtyping import QuantGranularity, TFLOperationName

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        layer[0].weight.mul_(torch.logspace(-1, 1, 32)[:, None])
    folder = tmp_path_factory.mktemp("int8")
    exported = litert_torch.convert(layer, (torch.zeros(1, 64),)).model_content()
    paths = {"float": folder / "float.tflite"}
    paths["float"].write_bytes(exported)
    for granularity in (QuantGranularity.CHANNELWISE, QuantGranularity.TENSORWISE):
        work = quantizer.Quantizer(bytes(exported))
        work.add_dynamic_config(
            ".*", TFLOperationName.FULLY_CONNECTED, num_bits=8, granularity=granularity
        )
        path = folder / f"{granularity.value}.tflite"
        path.write_bytes(work.quantize().quantized_model)
        paths[granularity.value.lower()] = path
    return paths


def test_weights_that_the_old_runtime_computes_wrongly_are_found(
    quantised: dict[str, Path],
) -> None:
    models = {name: flatbuffer.read_model(path) for name, path in quantised.items()}
    assert len(hybrid_channelwise(models["channelwise"])) == 2
    assert not hybrid_channelwise(models["tensorwise"]) + hybrid_channelwise(models["float"])
    with pytest.raises(
        ConversionError, match=r"tflite-2.14 cannot compute FULLY_CONNECTED .*32 sc"
    ):
        require_compatible(models["channelwise"], "tflite-2.14", "m")
    require_compatible(models["tensorwise"], "tflite-2.14", "m")


@pytest.mark.slow
def test_the_old_runtime_itself(app: Artifact, quantised: dict[str, Path]) -> None:
    """It runs the float file and int8 by tensor; int8 by channel is wrong without a word."""
    try:
        machine = prepare("tflite-2.14")
    except UnavailableError as error:
        pytest.skip(f"{error.message} {error.fix}")
    old = RunnerTarget(TARGET, machine)
    with old.load(app) as session:
        assert session.info.label == "tflite-runtime 2.14.0"
        assert session.info.details["numpy"].startswith("1.")
        found = session.run({"image": values()})["logits"]
    assert np.abs(found - truth()).max() <= 1e-5 * np.abs(truth()).max()
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)

    def run(target: Any, name: str) -> np.ndarray:
        path = quantised[name]
        (given,), (result,) = flatbuffer.signature(flatbuffer.read_model(path))
        artifact = Artifact(
            "tflite", path, "", 1, Precision.FP32, "m", "", "none", (given,), (result,)
        )
        with target.load(artifact) as session:
            return np.asarray(session.run({given.name: x})[result.name])

    reference = run(TARGET, "float")

    def error(target: Any, name: str) -> float:
        return float(np.abs(run(target, name) - reference).max() / np.abs(reference).max())

    assert error(old, "float") <= 1e-5
    assert error(TARGET, "channelwise") <= 0.1 and error(old, "tensorwise") <= 0.1
    assert error(old, "channelwise") > 0.3, "the error that compat refuses is still there"


@pytest.mark.parametrize("compat", [False, True])
def test_int8_weights_for_the_old_runtime_have_one_scale_in_linear_layers_alone(
    compat: bool, tmp_path: Path
) -> None:
    program = lower(model(), [IMAGE], ["logits"], name="vision", ops=())
    extra = {"compat": "tflite-2.14"} if compat else {}
    options = Options(Precision.INT8_DYNAMIC, extra)
    artifact = TARGET.convert(program, options, tmp_path)
    found = flatbuffer.read_model(artifact.path)
    names = flatbuffer.operator_names(found)
    graph = found.subgraphs[0]
    scales = {
        names[op.opcodeIndex]: len(graph.tensors[int(op.inputs[1])].quantization.scale)
        for op in graph.operators
        if names[op.opcodeIndex] in ("CONV_2D", "FULLY_CONNECTED")
    }
    assert scales == {"CONV_2D": 8, "FULLY_CONNECTED": 1 if compat else 4}
    assert bool(hybrid_channelwise(found)) is not compat
    with TARGET.load(artifact) as session:
        logits = session.run({"image": values()})["logits"]
    assert np.abs(logits - truth()).max() <= 0.05 * np.abs(truth()).max()
