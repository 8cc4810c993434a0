"""Core ML packages that keep a causal model's state themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flowexport_models import build_spec
from mobile_models import layer_program
from mutants import artifact_of, judge
from mutants_coreml import edit
from mutants_reach_coreml import COREML
from streaming_tools import write_recipe
from way_tools import converted_here

import flowexport
from flowexport.core.errors import ConversionError, InputError
from flowexport.core.types import Options, Precision, Verdict
from flowexport.lowering import LoweredProgram, decompose, lower_streaming, specialise
from flowexport.ops.installed import installed_ops
from flowexport.parity import streaming
from flowexport.targets.coreml import TARGET, stateful
from flowexport.targets.coreml.convert import to_package
from flowexport.targets.coreml.interpreter import InterpreterSession

pytest.importorskip("coremltools", reason="needs flowexport[coreml]")


@pytest.fixture(scope="module")
def causal() -> LoweredProgram:
    spec = build_spec(
        "flowformer-causal-timeseries", feat_dim=4, max_len=12, num_classes=3, d_model=16,
        n_heads=2, num_layers=1, d_ff=16,
    )  # fmt: skip
    torch.manual_seed(1)
    return lower_streaming(
        spec.build().eval(), spec.inputs, ["logits"], name="causal", ops=installed_ops()
    )


def test_state_inside_follows_the_explicit_one_and_its_drift_is_told(
    causal: LoweredProgram, tmp_path: Path
) -> None:
    ops = installed_ops()
    step, _ = decompose(specialise(causal.functions["step"], ops), "coreml", ops)
    last = {}
    for kind in ("split", "half"):
        path = tmp_path / f"{kind}.mlpackage"
        to_package(stateful.stateful_step(step, kind), Precision.FP32, "iOS18", path)
        told = stateful.measure_drift(path, step, kind, function=None, steps=80).to_json()
        assert told["execution"] == "interpreted" and [m for m, _ in told["drift"]] == [64]
        last[kind] = told["drift"][0][1]
    # Two numbers of 11 bits against one.
    assert last["split"] <= 5e-6 < 1e-4 < last["half"] < 0.1
    explicit = tmp_path / "explicit.mlpackage"
    to_package(step, Precision.FP32, "iOS18", explicit)
    with pytest.raises(ConversionError, match="has no state in the finished package"):
        stateful.measure_drift(explicit, step, "half", function=None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stateful")
    recipe = write_recipe(
        folder,
        ("  onnx: {}\ntol", "  coreml: {stateful: split}\ntol"),
        ("streaming: {lengths: [70]}", "streaming: true"),
        ("fusions:\n  onnx: {FlowAttention: 1}\n", ""),
    )
    with (
        converted_here(),
        mock.patch.object(stateful, "STEPS", 70),
        mock.patch.object(streaming, "DRIFT_STEPS", 128),
    ):
        result = flowexport.convert(recipe, out=folder / "bundle", bench=False)
    assert result.verdict is Verdict.PASS, result.parity["coreml"].reason
    return result.bundle


@pytest.mark.slow
def test_state_inside_is_one_more_function(bundle: Path) -> None:
    artifact = artifact_of(bundle, "coreml")
    size = artifact.details["size"]
    assert size["shared_bytes"] < sum(size["separate_bytes"].values())
    assert artifact.details["stateful"]["drift"][0][1] < 5e-6
    function = artifact.function("step_stateful")
    assert [s.name for s in function.inputs] == ["x"]
    frame = {"x": np.ones((1, 3), np.float32)}
    with TARGET.load(function) as session:
        assert isinstance(session, InterpreterSession)
        first, second = session.run(frame)["logits"], session.run(frame)["logits"]
        session.reset_states()
        np.testing.assert_array_equal(session.run(frame)["logits"], first)
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a state that is not updated", "epsilon"])
def test_verify_runs_the_state_inside(bundle: Path, damage: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    path = artifact_of(copy, "coreml").path
    if damage == "epsilon":
        COREML.epsilon("step_stateful", path)
    else:
        edit(_forget, path)
    report = judge(copy, "coreml")
    assert report.verdict is Verdict.FAIL and report.failure is not None
    assert "step_stateful is" in report.failure and "of the largest output off" in report.failure
    # Every other function is right.
    assert report.cases and not any(c.violation(report.tolerance) for c in report.cases)


def _forget(spec: Any) -> None:
    """Write the first state back as it came."""
    function = spec.mlProgram.functions["step_stateful"]
    operations = function.block_specializations[function.opset].operations
    write = next(o for o in operations if o.type == "write_state")
    state = write.inputs["input"].arguments[0].name
    read = next(
        o
        for o in operations
        if o.type == "read_state" and o.inputs["input"].arguments[0].name == state
    )
    write.inputs["data"].arguments[0].name = read.outputs[0].name


def test_a_model_without_a_step_has_no_state(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stateful is asked for, but the model has no step"):
        TARGET.convert(layer_program("causal"), Options(extra={"stateful": "split"}), tmp_path)
