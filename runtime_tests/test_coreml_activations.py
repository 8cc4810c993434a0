"""Core ML's int8-static: which layers read int8, with which ranges, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_contract_targets import TOLERANCE
from torch import nn

from flowexport.calibration import write_samples
from flowexport.core.errors import ConversionError, InputError
from flowexport.core.types import Artifact, Dataset, Options, Precision, TensorSpec
from flowexport.lowering import LoweredProgram, lower
from flowexport.registry import TARGETS

TARGET = TARGETS.get("coreml")
STATIC = Precision.INT8_STATIC
LAYERS = {"first": "weights", "a": "integer", "b": "integer", "back": "integer", "last": "weights"}
pytestmark = pytest.mark.skipif(not TARGET.probe().converts, reason=str(TARGET.probe().reason))


class Branches(nn.Module):
    """Two layers that read one value, which a sum without a weight reads too."""

    def __init__(self, images: bool = False) -> None:
        super().__init__()
        self.images = images
        sizes = {"first": (3, 16), "a": (16, 16), "b": (16, 16), "back": (16, 16), "last": (16, 4)}
        for name, (n, m) in sizes.items():
            self.add_module(name, nn.Conv2d(n, m, 1) if images else nn.Linear(n, m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.back(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))
        return self.last(x).mean(dim=(2, 3) if self.images else 1)  # type: ignore[no-any-return]


def module(images: bool = False) -> nn.Module:
    torch.manual_seed(5)
    return Branches(images).eval()


def program(images: bool = False, steps: int | str = 6) -> LoweredProgram:
    spec = TensorSpec("x", ("batch", 3, 4, 4) if images else ("batch", steps, 3))
    told = {"layout": "NCHW", "range": [0.0, 1.0], "mean": [0.5] * 3, "std": [0.25] * 3}
    return lower(module(images), [spec], ["y"], name="branches", ops=(),
                 preprocessing=told if images else {})  # fmt: skip


def samples(images: bool = False, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if images:
        return ((rng.integers(0, 256, (8, 3, 4, 4)) / 255 - 0.5) / 0.25).astype(np.float32)
    return rng.standard_normal((8, 6, 3)).astype(np.float32)


def written(x: np.ndarray, path: Path) -> Path:
    write_samples(Dataset("drawn", {"x": x}, np.arange(len(x)) % 2, (), "made here"), path)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(samples(), tmp_path_factory.mktemp("calibration") / "samples.safetensors")


@pytest.fixture(scope="module")
def made(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convert(tmp_path_factory.mktemp("made"), calibration)


def convert(out: Path, calibration: Path | None, images: bool = False, **extra: Any) -> Artifact:
    return TARGET.convert(program(images), Options(STATIC, extra, (), calibration), out)


def layers(artifact: Artifact) -> dict[str, str]:
    return {e["path"]: e["found"] for e in artifact.details["quantisation"]["layers"]}


def error(artifact: Artifact, images: bool = False) -> float:
    """Return how far the results of samples that calibrated nothing are from float64's."""
    x = samples(images, seed=1)
    with torch.no_grad():
        truth = module(images).double()(torch.from_numpy(x).double()).numpy()
    with TARGET.load(artifact) as session:
        found = np.concatenate([session.run({"x": row[None]})["y"] for row in x])
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def test_layers_read_int8_and_the_numbers_stay_close(made: Artifact) -> None:
    assert layers(made) == LAYERS
    found = made.details
    # a and b share a pair; the sum beside them reads what was not rounded.
    assert (found["operators"]["quantize"], found["operators"]["dequantize"]) == (2, 2)
    assert found["operators"]["constexpr_affine_dequantize"] == 5
    assert found["deployment_target"] == "iOS17"
    assert found["quantisation"]["calibration"] == {"dataset": "drawn", "samples": 8}
    assert 0 < error(made) <= TOLERANCE[STATIC]


def test_scales_are_the_largest_magnitude_over_the_samples(made: Artifact) -> None:
    with torch.no_grad():
        model = module()
        x = model.first(torch.from_numpy(samples()))  # type: ignore[operator]
        gated = torch.relu(model.a(x)) * torch.sigmoid(model.b(x))  # type: ignore[operator]
    wanted = sorted(float(v.abs().max()) / 127 for v in (x, gated))
    # The scale is a float16 (5e-4), and so are the values (5e-4 each of two layers).
    assert scales(made) == pytest.approx(wanted, rel=3e-3)


def scales(artifact: Artifact, function: str | None = None) -> list[float]:
    """Return the scales of a finished package's ``quantize``, read by coremltools."""
    from flowexport.targets.coreml.interpreter.program import load_package

    operations = load_package(artifact.path, function).function.operations
    return sorted(float(op.scale.val) for op in operations if op.op_type == "quantize")


@pytest.mark.parametrize("factor", [1 / 8, 32], ids=["narrow", "wide"])
def test_wrong_ranges_are_worse(
    factor: float,
    made: Artifact,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the error of the right ones says something of them."""
    from flowexport.targets.coreml import activations

    measure = activations.measure_peaks

    def wrong(*args: Any) -> Mapping[str, float]:
        return {name: peak * factor for name, peak in measure(*args).items()}

    monkeypatch.setattr(activations, "measure_peaks", wrong)
    assert error(convert(tmp_path, calibration)) > 4 * error(made)


@pytest.mark.parametrize("extra", [{"layout": "ane"}, {"image": True}, {"keep_fp32": ["relu"]}])
def test_convolutions_images_and_kept_operators(extra: dict[str, Any], tmp_path: Path) -> None:
    file = written(samples(images=True), tmp_path / "samples.safetensors")
    artifact = convert(tmp_path / "out", file, images=True, **extra)
    assert layers(artifact) == LAYERS
    assert artifact.details["operators"]["conv"] == 5
    assert 0 < error(artifact, images=True) <= TOLERANCE[STATIC]


def test_keep_float_keeps_a_layer_and_what_it_reads(calibration: Path, tmp_path: Path) -> None:
    artifact = TARGET.convert(program(), Options(STATIC, {}, ("back",), calibration), tmp_path)
    assert layers(artifact) == {**LAYERS, "back": "float"}
    assert artifact.details["operators"]["quantize"] == 1


def test_a_layer_left_in_float_fails_the_conversion(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowexport.targets.coreml import compress

    insert = compress.quantise_activations

    def forgets(model: Any, operators: dict[str, str], *rest: Any) -> Any:
        return insert(model, dict(list(operators.items())[:-1]), *rest)

    monkeypatch.setattr(compress, "quantise_activations", forgets)
    with pytest.raises(ConversionError, match=r"^convert coreml branches: layer back is weights"):
        convert(tmp_path, calibration)


def test_int8_outside_the_layers_fails_the_conversion(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """coremltools' pass takes sums too."""
    from flowexport.targets.coreml import compress

    insert = compress.quantise_activations

    def takes_more(model: Any, operators: dict[str, str], *rest: Any) -> Any:
        sums = [
            op
            for op in model._mil_program.functions["main"].operations
            if op.op_type == "add" and op.x.val is None and op.y.val is None
        ]
        assert len(sums) == 1
        return insert(
            model, {**operators, sums[0].name: sums[0].x.name, "y": sums[0].y.name}, *rest
        )

    monkeypatch.setattr(compress, "quantise_activations", takes_more)
    with pytest.raises(ConversionError, match=r"add .* reads int8 activations"):
        convert(tmp_path, calibration)


def test_no_samples_and_samples_past_half_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has no calibration samples"):
        convert(tmp_path, None)
    huge = written(samples() * 1e6, tmp_path / "huge.safetensors")
    with pytest.raises(ConversionError, match=r"reaches (inf|nan) .* the largest float16"):
        convert(tmp_path, huge)


@pytest.mark.parametrize(
    ("sizes", "refused"),
    [({"sizes": [4, 6]}, None), ({"range": [2, 5]}, "1x6x3; expected 1x2..5x3")],
)
def test_a_flexible_length_is_calibrated_at_the_samples_length(
    sizes: dict[str, Any], refused: str | None, calibration: Path, tmp_path: Path
) -> None:
    options = Options(STATIC, {"flexible": {"length": sizes}}, (), calibration)
    if refused is None:
        artifact = TARGET.convert(program(steps="length"), options, tmp_path)
        assert layers(artifact) == LAYERS
        assert 0 < error(artifact) <= TOLERANCE[STATIC]
        return
    with pytest.raises(InputError, match=f"a calibration sample's x is {refused}") as caught:
        TARGET.convert(program(steps="length"), options, tmp_path)
    assert "that `flexible` allows" in str(caught.value.fix)


def test_the_same_samples_give_the_same_bytes(
    made: Artifact, calibration: Path, tmp_path: Path
) -> None:
    assert convert(tmp_path, calibration).sha256 == made.sha256


def test_tiny_values_get_a_scale_that_no_device_flushes(tmp_path: Path) -> None:
    tiny = written(samples() * 0, tmp_path / "zero.safetensors")
    plain = program()
    for name, value in plain.exported.state_dict.items():
        if name.endswith("bias"):
            value.data.zero_()
    artifact = TARGET.convert(plain, Options(STATIC, {}, (), tiny), tmp_path)
    assert scales(artifact) == [2.0**-14] * 2


def test_an_older_system_is_refused_before_any_work() -> None:
    old = Options(STATIC, {"deployment_target": "iOS16"})
    with pytest.raises(InputError, match=r"is iOS16; expected iOS17, .* in 8 bits") as e:
        TARGET.validate(old)
    assert "deployment_target: iOS17" in str(e.value.fix) and e.value.exit_code == 2
    TARGET.validate(Options(STATIC, {"deployment_target": "iOS17"}))
    TARGET.validate(Options(Precision.INT8_WEIGHTS, {"deployment_target": "iOS16"}))
