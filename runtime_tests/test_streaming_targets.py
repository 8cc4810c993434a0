"""Steps on every runtime equal one forward of the float64 reference."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from flowexport_models import build_model
from flowexport_models.flowformer_gpt import FlowformerGPT, FlowformerGPTConfig
from flowexport_models.streaming import CausalModel
from safetensors.torch import load_file

from flowexport.core.errors import InputError
from flowexport.core.streaming import Stream, StreamState
from flowexport.core.types import STEP, Artifact, Options, TensorSpec
from flowexport.lowering import LoweredProgram, lower_streaming
from flowexport.parity.streaming import run_steps
from flowexport.registry import OPS, TARGETS

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"feat_dim": 3, "max_len": 8, "num_classes": 3, "d_model": 8, "n_heads": 2}


def lowered(model: CausalModel, sequence: TensorSpec, *lengths: int) -> LoweredProgram:
    ops = list(OPS.working().values())
    return lower_streaming(model, [sequence], ["logits"], lengths=lengths, name="tiny", ops=ops)


@cache
def classifier() -> tuple[CausalModel, LoweredProgram]:
    torch.manual_seed(0)
    model = build_model("flowformer-causal-timeseries", **SIZES, num_layers=1, d_ff=8).eval()
    return model, lowered(model, TensorSpec("x", ("batch", 8, 3)), 200)


def steps(artifact: Artifact, model: CausalModel, name: str, inputs: np.ndarray) -> np.ndarray:
    reset = StreamState("", {n: v.numpy() for n, v in model.initial_state().items()})
    with TARGETS.get(artifact.target).load(artifact.function(STEP)) as session:
        return run_steps(Stream(session, model.max_steps), reset, name, "logits", inputs)


def truth_of(model: CausalModel, inputs: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(inputs)
    with torch.no_grad():
        wide = tensor.double() if tensor.is_floating_point() else tensor
        result: np.ndarray = model.double()(wide).numpy()
    model.float()
    return result


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    assert found.shape == truth.shape and found.dtype == np.float32
    return float(np.abs(found - truth).max() / np.abs(truth).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "tflite", "coreml"])
def test_1024_steps_equal_one_forward(name: str, tmp_path: Path) -> None:
    model, program = classifier()
    target = TARGETS.get(name)
    artifact = target.convert(program, Options(), tmp_path)
    assert list(artifact.functions) == ["forward_200", "step"]
    assert (len({f.path for f in artifact.functions.values()}) == 1) is (name != "onnx")
    x = np.random.default_rng(0).standard_normal((1, 1024, 3)).astype(np.float32)
    truth = truth_of(model, x)
    assert relative(steps(artifact, model, "x", x), truth) <= 1e-5
    for function, length in (("forward", 8), ("forward_200", 200)):
        with target.load(artifact.function(function)) as session:
            logits = session.run({"x": np.ascontiguousarray(x[:, :length])})["logits"]
            assert relative(logits, truth[:, :length]) <= 1e-5
            with pytest.raises(InputError, match=r"x has shape 1x1024x3; expected"):
                session.run({"x": x})
    (tmp_path / "again").mkdir()
    again = target.convert(program, Options(), tmp_path / "again")
    assert again.sha256 == artifact.sha256
    assert [f.sha256 for f in again.functions.values()] == [
        f.sha256 for f in artifact.functions.values()
    ]


def test_language_models_steps_on_onnx_runtime_reproduce_the_golden_vectors(
    tmp_path: Path,
) -> None:
    tensors = load_file(GOLDEN / "flowformer_gpt_nano.safetensors")
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight:")}
    vocab, width = weights["transformer.wte.weight"].shape
    block = weights["transformer.wpe.weight"].shape[0]
    model = FlowformerGPT(FlowformerGPTConfig(vocab, block, 3, 3, width)).eval()
    model.load_state_dict(weights)
    idx = next(v for k, v in tensors.items() if k.startswith("input:")).numpy()
    program = lowered(model, TensorSpec("idx", ("batch", idx.shape[1]), "int64"))
    artifact = TARGETS.get("onnx").convert(program, Options(), tmp_path)
    truth = tensors["output"].numpy()
    assert relative(steps(artifact, model, "idx", idx), truth) <= 1e-5
    with TARGETS.get("onnx").load(artifact) as session:
        assert relative(session.run({"idx": idx})["logits"], truth) <= 1e-5


def test_core_ml_functions_need_their_system(tmp_path: Path) -> None:
    _, program = classifier()
    options = Options(extra={"deployment_target": "iOS16"})
    with pytest.raises(InputError, match="deployment_target is iOS16; expected iOS18"):
        TARGETS.get("coreml").convert(program, options, tmp_path)
    assert not list(tmp_path.iterdir())


def test_programs_are_saved_with_their_functions(tmp_path: Path) -> None:
    _, program = classifier()
    program.save(tmp_path / "program.pt2")
    again = LoweredProgram.load(tmp_path / "program.pt2", list(OPS.working().values()))
    assert list(again.functions) == list(program.functions) == ["forward_200", STEP]
    assert again.functions[STEP].state == program.functions[STEP].state != {}
    assert again.functions[STEP].outputs == program.functions[STEP].outputs
    assert len(again.attentions) == len(again.functions["forward_200"].attentions) == 1
    assert not again.functions[STEP].attentions
