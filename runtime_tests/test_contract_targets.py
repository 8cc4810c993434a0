"""What every target must do, whoever wrote it: parametrised over the registry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowexport.calibration import write_samples
from flowexport.core.errors import FlowExportError, InputError, UnavailableError
from flowexport.core.hashing import sha256_tree, size_tree
from flowexport.core.types import (
    Artifact,
    Dataset,
    Options,
    Precision,
    Target,
    TensorSpec,
    float_precision,
)
from flowexport.lowering import LoweredProgram, lower
from flowexport.ops.flow_attention import VARIANTS, flow_attention
from flowexport.ops.installed import installed_ops
from flowexport.registry import TARGETS

INPUTS = (TensorSpec("x", ("batch", 6, 8)), TensorSpec("gain", ("batch", 6)))
LABELS = ("rest", "wave", "clap")
# fp32: one layer of sums of 6 to 32 terms, some roundings (6e-8) each.
# fp16: the same with 5e-4 each; also bounds targets that keep only weights in half.
# Quantised: two layers of weights (8 bits: 0.4 % of the largest, 6 and 4 bits 4 and 16 times
# that), and activations as coarse; int8-static's ranges come from other samples.
TOLERANCE = {
    Precision.FP32: 1e-5,
    Precision.FP16: 1e-2,
    Precision.INT8_WEIGHTS: 3e-2,
    Precision.INT8_DYNAMIC: 5e-2,
    Precision.INT8_STATIC: 1e-1,
    Precision.PALETTE8: 3e-2,
    Precision.PALETTE6: 1e-1,
    Precision.PALETTE4: 3e-1,
}


class Tiny(nn.Module):
    """Two inputs and two results, so that a swap or a transposition shows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        y = flow_attention(q, k, v, VARIANTS["timeseries"]).flatten(2) * gain.unsqueeze(-1)
        return self.head(y.mean(dim=1)), y


def tiny() -> Tiny:
    torch.manual_seed(7)
    return Tiny().eval()


def program(precision: Precision) -> LoweredProgram:
    return lower(
        tiny(),
        INPUTS,
        ["scores", "tokens"],
        name="tiny",
        ops=installed_ops(),
        precision=precision,
        labels=LABELS,
        preprocessing={"note": "as is"},
        recipe_sha256="ab" * 32,
    )


def feeds(batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "x": rng.standard_normal((batch, 6, 8)).astype(np.float32),
        "gain": rng.uniform(0.5, 2, (batch, 6)).astype(np.float32),
    }


def expected(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    module = tiny().double()
    with torch.no_grad():
        scores, tokens = module(*(torch.from_numpy(inputs[s.name]).double() for s in INPUTS))
    return {"scores": scores.numpy(), "tokens": tokens.numpy()}


@pytest.fixture(scope="module", params=TARGETS.names())
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS.get(request.param)


@pytest.fixture(scope="module")
def artifacts(
    target: Target, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Artifact]:
    availability = target.probe()
    if not availability.converts:
        pytest.skip(f"{target.name} cannot convert here: {availability.reason}")
    samples = tmp_path_factory.mktemp(target.name) / "samples.safetensors"
    write_samples(Dataset("tiny", feeds(16), np.arange(16) % 2, (), "made here"), samples)
    return {
        precision: target.convert(
            program(float_precision(target, precision)),
            Options(precision, calibration=samples),
            tmp_path_factory.mktemp(f"{target.name}-{precision}"),
        )
        for precision in target.precisions
    }


def test_probe_says_what_works_and_what_mends_it(target: Target) -> None:
    availability = target.probe()
    assert availability.toolchain if availability.converts else availability.reason
    if not availability.runs:
        assert availability.reason, "a target that does not run says why"


def test_unknown_option_is_refused_with_the_valid_ones(target: Target) -> None:
    with pytest.raises(FlowExportError) as caught:
        target.validate(Options(extra={"no_such_option": 1}))
    assert "no_such_option" in caught.value.message
    assert caught.value.exit_code == 2


def test_every_target_offers_fp32_and_fp16(target: Target) -> None:
    assert {Precision.FP32, Precision.FP16} <= set(target.precisions)


def test_artifact_describes_its_file(target: Target, artifacts: dict[Precision, Artifact]) -> None:
    for precision, artifact in artifacts.items():
        assert artifact.target == target.name
        assert artifact.path.name.endswith(target.suffix)
        assert artifact.precision is precision
        assert artifact.sha256 == sha256_tree(artifact.path)
        assert artifact.size_bytes == size_tree(artifact.path) > 0
        assert artifact.recipe_sha256 == "ab" * 32
        assert [s.name for s in artifact.inputs] == ["x", "gain"]
        assert [s.name for s in artifact.outputs] == ["scores", "tokens"]
        assert {s.dtype for s in (*artifact.inputs, *artifact.outputs)} == {"float32"}
        assert artifact.form and artifact.toolchain
        again = json.loads(json.dumps(artifact.to_json(artifact.path.parent)))
        assert Artifact.from_json(again, artifact.path.parent).inputs == artifact.inputs


ANOTHER_PROCESS = """
import sys
from pathlib import Path
from test_contract_targets import TARGETS, Options, Precision, program
made = TARGETS.get(sys.argv[1]).convert(program(Precision.FP32), Options(), Path(sys.argv[2]))
print(made.sha256)
"""


def test_another_process_writes_the_same_bytes(
    target: Target, artifacts: dict[Precision, Artifact], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, target.name, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    # The hash alone: converters that print would break the CLI's --json.
    assert done.stdout == f"{artifacts[Precision.FP32].sha256}\n", done.stderr[-2000:]


def test_inspect_reads_the_same_from_the_file(
    target: Target, artifacts: dict[Precision, Artifact]
) -> None:
    found: dict[str, Any] = target.inspect(artifacts[Precision.FP32].path)
    json.dumps(found)
    assert {"inputs", "outputs", "operators", "fusions"} <= set(found)
    names = [entry["name"] for entry in found["inputs"]]
    if names:  # an engine's tensors cannot be read without its device
        assert sorted(names) == ["gain", "x"]
        assert sorted(entry["name"] for entry in found["outputs"]) == ["scores", "tokens"]
    assert sum(found["operators"].values()) > 0


def test_inspect_refuses_what_is_no_artifact(target: Target, tmp_path: Path) -> None:
    if not target.probe().converts:
        pytest.skip(f"{target.name} is not installed: {target.probe().reason}")
    path = tmp_path / f"broken{target.suffix}"
    path.write_bytes(b"this is no model")
    with pytest.raises(FlowExportError):
        target.inspect(path)


def test_numbers_survive(target: Target, artifacts: dict[Precision, Artifact]) -> None:
    truth = expected(feeds())
    for precision, artifact in artifacts.items():
        try:
            session = target.load(artifact)
        except UnavailableError as error:
            assert not target.probe().runs
            pytest.skip(f"{target.name} does not run here: {error.message}")
        with session:
            result = session.run(feeds())
            assert session.info.execution in ("native", "interpreted", "emulated")
        assert list(result) == ["scores", "tokens"]
        for name, value in result.items():
            assert value.dtype == np.float32 and value.shape == truth[name].shape
            error = np.abs(value - truth[name]).max() / np.abs(truth[name]).max()
            assert error <= TOLERANCE[precision], f"{precision} {name}: {error}"


def test_session_refuses_wrong_feeds(target: Target, artifacts: dict[Precision, Artifact]) -> None:
    try:
        session = target.load(artifacts[Precision.FP32])
    except UnavailableError as error:
        pytest.skip(f"{target.name} does not run here: {error.message}")
    good = feeds()
    with session:
        for bad, message in (
            ({"x": good["x"]}, "expected"),
            ({**good, "extra": good["x"]}, "expected"),
            ({**good, "x": good["x"][:, :5]}, "shape"),
            ({**good, "x": good["x"].astype(np.float64)}, "dtype"),
        ):
            with pytest.raises(InputError, match=message):
                session.run(bad)


def test_same_program_gives_the_same_bytes_or_says_why_not(
    target: Target, artifacts: dict[Precision, Artifact], tmp_path: Path
) -> None:
    first = artifacts[Precision.FP32]
    again = target.convert(program(Precision.FP32), Options(Precision.FP32), tmp_path)
    if again.sha256 != first.sha256:
        assert first.details.get("deterministic") is False
        assert first.details.get("deterministic_reason")
