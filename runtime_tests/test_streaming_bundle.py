"""A causal model's bundle: forward and step, verified, measured, reported; states checked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming_tools import write_recipe

import flowexport
from flowexport import parity
from flowexport.baseline.steps import compare_steps
from flowexport.bundle import Bundle
from flowexport.core.errors import BundleError, InputError, UnknownNameError, VerificationError
from flowexport.core.streaming import Stream, StreamState
from flowexport.core.types import Artifact, Verdict
from flowexport.registry import TARGETS
from flowexport.resolve import find_recipe, resolve

LAYER = ("k_mean", "q_mean", "k_flow", "q_flow", "weight_mean", "context")
STATE = ("frames", *(f"layer0_{n}" for n in LAYER), "pool_mean", "t")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> flowexport.pipeline.Result:
    folder = tmp_path_factory.mktemp("stream")
    return flowexport.convert(write_recipe(folder), out=folder / "bundle")


@pytest.fixture(scope="module")
def artifact(result: Any) -> Artifact:
    return Bundle.open(result.bundle).artifacts()["onnx"]


@pytest.fixture
def stream(artifact: Artifact) -> Iterator[Stream]:
    with TARGETS.get("onnx").load(artifact.function("step")) as session:
        yield Stream(session, max_steps=100)


@pytest.fixture(scope="module")
def reset(result: Any) -> StreamState:
    return parity.read_state(result.bundle / "golden" / "state.safetensors")


def test_manifest_tells_every_function_and_its_state(result: Any) -> None:
    manifest = result.manifest
    assert manifest["streaming"]["lengths"] == [8, 70]
    assert manifest["streaming"]["max_steps"] is None
    assert [s["name"] for s in manifest["streaming"]["state"]] == list(STATE)
    functions = manifest["targets"]["onnx"]["functions"]
    assert set(functions) == {"forward_70", "step"}
    step = functions["step"]
    assert step["state"] == {n: f"next_{n}" for n in STATE}
    assert [s["shape"] for s in step["inputs"]][:2] == [["batch", 3], ["batch", 2, 3]]
    assert [s["name"] for s in step["outputs"]] == ["logits", *(f"next_{n}" for n in STATE)]
    assert functions["forward_70"]["outputs"][0]["shape"] == ["batch", 70, 3]
    listed = {f["path"] for f in functions.values()}
    assert len(listed) == 2 and listed <= set(manifest["files"])
    values = [np.prod(s["shape"]) for s in manifest["streaming"]["state"]]
    assert manifest["streaming"]["state_bytes"] == 4 * sum(values)


def test_onnx_file_says_what_its_state_is(artifact: Artifact) -> None:
    found = TARGETS.get("onnx").inspect(artifact.functions["step"].path)
    assert json.loads(found["metadata"]["state"]) == {n: f"next_{n}" for n in STATE}
    assert "state" not in TARGETS.get("onnx").inspect(artifact.path)["metadata"]


def test_steps_are_held_to_the_float64_reference(result: Any) -> None:
    report = result.parity["onnx"]
    assert report.verdict is Verdict.PASS, report.reason
    names = {c.case for c in report.cases}
    assert {"step/random-0", "step/batch-3", "step/4096-steps"} <= names
    assert {"step/1024-steps-forward", "forward_70/stream"} <= names
    assert report.max_rel is not None and 0 < report.max_rel <= 1e-5
    assert report.stream is not None and report.stream.steps == 4096
    assert [n for n, _ in report.stream.drift] == [64, 256, 1024, 4096]
    assert all(0 < e <= 1e-5 for _, e in report.stream.drift)
    assert type(report).from_json(report.to_json()) == report


def test_step_is_measured_beside_the_forward(result: Any) -> None:
    times = result.latency["onnx"].steps
    assert times is not None and times.length == 70
    assert len(times.step_ms) == 20 * len(times.forward_ms) >= 60
    assert times.speedup == pytest.approx(
        np.median(times.forward_ms) / np.median(times.step_ms), rel=1e-9
    )


def test_report_shows_steps(result: Any) -> None:
    page = (result.bundle / "report.html").read_text()
    assert "Step by step" in page and "9 tensors" in page
    assert re.search(r"4096: \d\.?\d*e-\d", page)


def test_stream_from_the_bundle_equals_the_golden_forward(
    result: Any, stream: Stream, reset: StreamState
) -> None:
    golden = parity.read_golden(result.bundle / "golden")
    x, truth = golden.cases["random-0"]["x"], golden.expected["random-0"]["logits"]
    state = reset
    for t in range(x.shape[1]):
        outputs, state = stream.step({"x": np.ascontiguousarray(x[:, t])}, state)
        assert list(outputs) == ["logits"] and state.steps == t + 1
        assert np.abs(outputs["logits"] - truth[:, t]).max() <= 1e-5 * np.abs(truth).max()
    assert state.size_bytes == result.manifest["streaming"]["state_bytes"]
    assert not reset.values["t"].any(), "the reset state is not changed"


def test_state_survives_a_file(tmp_path: Path, stream: Stream, reset: StreamState) -> None:
    x = {"x": np.ones((1, 3), np.float32)}
    _, state = stream.step(x, reset)
    parity.write_state(tmp_path / "s.safetensors", state)
    again = parity.read_state(tmp_path / "s.safetensors")
    assert (again.model, again.steps) == (state.model, 1)
    a, _ = stream.step(x, state)
    b, _ = stream.step(x, again)
    assert np.array_equal(a["logits"], b["logits"])


def test_a_state_that_does_not_fit_is_told_at_once(stream: Stream, reset: StreamState) -> None:
    x = {"x": np.ones((1, 3), np.float32)}
    other = replace(reset, model="f" * 64)
    with pytest.raises(InputError, match=r"state is of the model ffffffffffff…; expected [0-9a-f]"):
        stream.step(x, other)
    values = dict(reset.values)
    wrong = {**values, "pool_mean": np.zeros((1, 9), np.float32)}
    with pytest.raises(InputError, match=r"state: pool_mean has shape 1x9; expected batchx8\."):
        stream.step(x, replace(reset, values=wrong))
    wrong = {**values, "t": np.zeros(1)}
    with pytest.raises(InputError, match=r"t has dtype float64; expected float32"):
        stream.step(x, replace(reset, values=wrong))
    del values["frames"]
    with pytest.raises(InputError, match=r"the state has \['layer0_context'.*expected \['frames'"):
        stream.step(x, replace(reset, values=values))
    with pytest.raises(InputError, match=r"has 100 steps; expected fewer than 100"):
        stream.step(x, replace(reset, steps=100))
    with pytest.raises(InputError, match="t is state; expected it in the state"):
        stream.step({**x, "t": np.zeros(1, np.float32)}, reset)


def test_a_session_of_forward_does_not_stream(artifact: Artifact) -> None:
    with (
        TARGETS.get("onnx").load(artifact) as session,
        pytest.raises(InputError, match="session is of 'forward'; expected the function 'step'"),
    ):
        Stream(session)
    with pytest.raises(UnknownNameError, match="forward_70"):
        artifact.function("stap")


@pytest.mark.parametrize("length", [7, 9, 71])
def test_a_sequence_of_another_length_is_told(artifact: Artifact, length: int) -> None:
    with (
        TARGETS.get("onnx").load(artifact) as session,
        pytest.raises(InputError, match=rf"x has shape 1x{length}x3; expected batchx8x3"),
    ):
        session.run({"x": np.zeros((1, length, 3), np.float32)})


def test_another_models_step_fails_verification(result: Any, tmp_path: Path) -> None:
    """Negative control: the steps are really run and compared."""
    copy = tmp_path / "bundle"
    shutil.copytree(result.bundle, copy)
    bundle = Bundle.open(copy)
    artifact = bundle.artifacts()["onnx"]
    step = artifact.functions["step"]
    import onnx
    from onnx import numpy_helper

    model = onnx.load(step.path)
    bias = next(t for t in model.graph.initializer if t.name.endswith("head.bias"))
    values = numpy_helper.to_array(bias) + np.float32(0.01)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, step.path)
    golden, stream = (
        parity.read_golden(copy / "golden"),
        parity.read_stream(copy / "golden", subject=bundle.manifest["recipe_sha256"]),
    )
    tolerance = parity.Tolerance(max_rel=1e-5, reason="test")
    checked = parity.verify_artifact(
        TARGETS.get("onnx"), artifact, golden, None, tolerance, stream=stream
    )
    assert checked.verdict is Verdict.FAIL and "(step) is not what" in str(checked.reason)
    unchecked = parity.verify_artifact(
        TARGETS.get("onnx"), artifact, golden, None, tolerance, stream=stream, check_hash=False
    )
    assert unchecked.verdict is Verdict.FAIL
    broken = {c.case for c in unchecked.cases if c.violation(tolerance)}
    assert broken and all(case.startswith("step/") for case in broken)


def test_damaged_stream_files_are_told(result: Any, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(result.bundle / "golden", folder)
    with pytest.raises(BundleError, match="it was written for"):
        parity.read_stream(folder, subject="0" * 64)
    (folder / "stream.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match="cannot be read"):
        parity.read_stream(folder, subject=result.manifest["recipe_sha256"])
    (folder / "state.safetensors").unlink()
    with pytest.raises(BundleError, match="is missing"):
        parity.read_state(folder / "state.safetensors")


def test_step_beside_running_the_published_forward_again(
    artifact: Artifact, tmp_path: Path
) -> None:
    """``bench --baseline``: here our own forward stands for the stock export's."""
    module = resolve(find_recipe(write_recipe(tmp_path))).module
    forward = replace(artifact, functions={})
    x = np.random.default_rng(0).standard_normal((1, 8, 3)).astype(np.float32)
    settings: dict[str, Any] = {"threads": 1, "warmup": 1, "rounds": 3, "min_seconds": 0.0}
    found = compare_steps(module, artifact, forward, {"x": x}, max_rel=1e-5, **settings)
    told = found.to_json()
    assert told["length"] == 8 and 0 < told["max_rel"] <= 1e-5
    assert len(found.times.forward_ms) == 3 and len(found.times.step_ms) == 60
    ratio = told["ratio"]
    assert ratio["ci_low"] <= ratio["median"] <= ratio["ci_high"]
    assert ratio["median"] == told["forward_ms_p50"] / told["step_ms_p50"]
    with pytest.raises(VerificationError, match="step: ours differs from the baseline"):
        compare_steps(module, artifact, forward, {"x": x}, max_rel=1e-12, **settings)
