"""int8-static: what its ranges hold, what they clip of each case, and how that is judged."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowexport.calibration import write_samples
from flowexport.core.reports import ParityReport, Tolerance
from flowexport.core.types import Artifact, Dataset, Options, Precision, TensorSpec, Verdict
from flowexport.lowering import LoweredProgram, lower
from flowexport.parity import (
    Golden,
    make_cases,
    reference_outputs,
    verify_artifact,
)
from flowexport.parity.identity import Identity
from flowexport.recipes.tolerances import DEFAULT_TOLERANCES
from flowexport.registry import TARGETS

SPEC = TensorSpec("x", ("batch", 6, 16))
LIMITS = Tolerance.from_json(DEFAULT_TOLERANCES["int8-static"])
NARROW = 0.02
FORMATS = ("onnx", "tflite", "coreml")


class Blocks(nn.Module):
    """Two blocks between layers that stay in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.b(torch.relu(self.a(x)))
        return self.last(x).mean(dim=1)  # type: ignore[no-any-return]


def module() -> nn.Module:
    torch.manual_seed(11)
    made = Blocks().eval().requires_grad_(False)
    made.first.bias.zero_()  # a converter may take it into the next layer's
    made.b.weight *= 8  # so that what it reads tells in the result
    return made


def ends_of(name: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a layer reads and gives; TFLite has the relu behind ``a`` inside it."""
    return {f"{name} input": x, f"{name} output": torch.relu(y) if name == "a" else y}


def drawn(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 6, 16)).astype(np.float32)


def dataset() -> Dataset:
    x = drawn(8, 1)
    return Dataset("drawn", {"x": x}, np.arange(8) % 4, ("a", "b", "c", "d"), "made here")


@pytest.fixture(scope="module")
def golden() -> Golden:
    cases = make_cases([SPEC], dataset())
    return Golden(cases, reference_outputs(module(), cases, ["y"]), "0")


@pytest.fixture(scope="module")
def program() -> LoweredProgram:
    return lower(module(), [SPEC], ["y"], name="blocks", ops=())


@pytest.fixture(scope="module", params=FORMATS)
def made(
    request: pytest.FixtureRequest,
    program: LoweredProgram,
    golden: Golden,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Artifact]:
    """Two files of one format, the second calibrated on samples that are far too small."""
    target = TARGETS.get(request.param)
    if not target.probe().converts:
        pytest.skip(str(target.probe().reason))
    found = {}
    for name, factor in (("sound", 1.0), ("narrow", NARROW)):
        folder = tmp_path_factory.mktemp(f"{request.param}-{name}")
        samples = Dataset("some", {"x": drawn(64, 2) * np.float32(factor)}, np.arange(64), (), "")
        write_samples(samples, folder / "samples", {"": golden.cases})
        options = Options(Precision.INT8_STATIC, {}, (), folder / "samples")
        found[name] = target.convert(program, options, folder)
    return found


def judged(artifact: Artifact, golden: Golden) -> ParityReport:
    target = TARGETS.get(artifact.target)
    return verify_artifact(target, artifact, golden, None, LIMITS, identity=identity(artifact))


def identity(artifact: Artifact) -> Identity:
    return Identity(
        artifact.model, artifact.precision.value, artifact.recipe_sha256, details=artifact.details
    )


def test_ranges_hold_every_sample_and_are_read_from_the_file(made: Mapping[str, Artifact]) -> None:
    artifact = made["sound"]
    ranges: dict[str, Any] = artifact.details["ranges"]
    ends = {"a input", "b input"} | (
        {"a output", "b output"} if artifact.target == "tflite" else set()
    )
    assert set(ranges) == ends
    model = module().double()
    reads: dict[str, torch.Tensor] = {}
    for name in ("a", "b"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, x, y, name=name: reads.update(ends_of(name, x[0], y)))
    model(torch.from_numpy(drawn(64, 2)).double())
    for end, (low, high) in ranges.items():
        values = reads[end]
        if artifact.target == "coreml":  # symmetric
            assert high == -low == pytest.approx(float(values.abs().max()), rel=2e-3)
        else:  # within a step of 1/255: the zero point is a whole number
            step = (high - low) / 255
            assert low == pytest.approx(min(0.0, float(values.min())), abs=step)
            assert high == pytest.approx(max(0.0, float(values.max())), abs=step)
    assert TARGETS.get(artifact.target).inspect(artifact.path)["ranges"] == ranges


def test_what_is_clipped_of_each_case_is_what_float64_says(
    made: Mapping[str, Artifact], golden: Golden
) -> None:
    artifact = made["sound"]
    ranges, told = artifact.details["ranges"], artifact.details["clipping"]
    assert set(told) == set(golden.cases)
    model = module().double()
    shares: dict[str, float] = {}

    def look(end: str, values: torch.Tensor) -> None:
        lost = values - values.clamp(*ranges[end])
        shares[end] = float(lost.norm() / values.norm().clamp_min(1e-30))

    def hook(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        for end, values in ends_of(name, x, y).items():
            if end in ranges:
                look(end, values)

    for name in ("a", "b"):
        model.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: hook(name, x[0], y)
        )
    for case, feeds in golden.cases.items():
        model(torch.from_numpy(feeds["x"]).double())
        assert told[case]["clipped"] == pytest.approx(max(shares.values()), abs=5e-3)
    assert told["large"]["clipped"] > 0.5 and told["large"]["stretch"] > 4
    assert all(told[case]["clipped"] < 0.1 for case in told if case != "large")


def test_a_sound_file_passes_and_tells_what_it_clips(
    made: Mapping[str, Artifact], golden: Golden
) -> None:
    report = judged(made["sound"], golden)
    assert report.problems == ()
    assert [c.case for c in report.outside] == ["large"]
    (large,) = report.outside
    assert large.max_rel is not None and large.max_rel > LIMITS.max_rel
    assert report.max_rel is not None and report.max_rel < 0.1


def test_ranges_that_are_far_too_narrow_fail_on_real_samples(
    made: Mapping[str, Artifact], golden: Golden
) -> None:
    report = judged(made["narrow"], golden)
    assert report.verdict is Verdict.FAIL
    told = [p for p in report.problems if "of real samples" in p]
    assert {p.split(":")[0] for p in told} == {c for c in golden.cases if c.startswith("sample-")}
    # Drawn cases are outside then, and say nothing.
    assert not {p.split(":")[0] for p in report.problems} & {c.case for c in report.outside}


def test_without_real_samples_nothing_is_left_to_judge(
    made: Mapping[str, Artifact], golden: Golden
) -> None:
    drawn_only = {c: v for c, v in golden.cases.items() if not c.startswith("sample-")}
    expected = {c: golden.expected[c] for c in drawn_only}
    report = judged(made["narrow"], Golden(drawn_only, expected, "0"))
    assert report.verdict is Verdict.FAIL
    assert "lie inside the calibrated ranges; expected at least 3" in report.problems[-1]


def test_ranges_in_the_manifest_that_are_not_the_files_fail(
    made: Mapping[str, Artifact], golden: Golden
) -> None:
    artifact = made["sound"]
    details = copy.deepcopy(dict(artifact.details))
    details["ranges"]["a input"] = [-1e3, 1e3]
    report = judged(dataclasses.replace(artifact, details=details), golden)
    assert report.verdict is Verdict.FAIL
    assert "its ranges are not those of the manifest: a input" in str(report.reason)


def test_a_damaged_file_fails_on_the_cases_inside(
    made: Mapping[str, Artifact], program: LoweredProgram, golden: Golden, tmp_path: Path
) -> None:
    artifact = made["sound"]
    damaged = module()
    damaged.get_submodule("b").weight[::3] *= -1  # type: ignore[index,operator,union-attr]
    write_samples(Dataset("some", {"x": drawn(64, 2)}, np.arange(64), (), ""), tmp_path / "samples")
    options = Options(Precision.INT8_STATIC, {}, (), tmp_path / "samples")
    other = lower(damaged, [SPEC], ["y"], name="blocks", ops=())
    wrong = TARGETS.get(artifact.target).convert(other, options, tmp_path)
    # What the sound file clips still excuses `large` alone.
    wrong = dataclasses.replace(
        wrong, details={**wrong.details, "clipping": artifact.details["clipping"]}
    )
    report = judged(wrong, golden)
    broken = {c.case for c in report.cases if c.violation(LIMITS)}
    assert report.verdict is Verdict.FAIL and "large" not in broken
    assert len(broken) >= len(golden.cases) // 2
