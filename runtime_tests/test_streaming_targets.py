"""Steps on every runtime equal one forward of the float64 reference."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from flowexport_models import build_model
from flowexport_models.attention import FlowAttention
from flowexport_models.flowformer_gpt import FlowformerGPT, FlowformerGPTConfig
from flowexport_models.streaming import CausalModel
from safetensors.torch import load_file

from flowexport.core.errors import InputError
from flowexport.core.streaming import Stream, StreamState
from flowexport.core.types import STEP, Artifact, Options, Precision, TensorSpec
from flowexport.lowering import LoweredProgram, lower, lower_streaming
from flowexport.ops.flow_attention import VARIANTS, FlowVariant
from flowexport.ops.installed import installed_ops
from flowexport.parity.streaming import run_steps
from flowexport.registry import TARGETS

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"feat_dim": 3, "max_len": 8, "num_classes": 3, "d_model": 8, "n_heads": 2}


def lowered(
    model: CausalModel,
    sequence: TensorSpec,
    *lengths: int,
    precision: Precision = Precision.FP32,
) -> LoweredProgram:
    return lower_streaming(
        model,
        [sequence],
        ["logits"],
        lengths=lengths,
        name="tiny",
        ops=installed_ops(),
        precision=precision,
    )


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


SLOW = pytest.mark.slow
RUNTIMES = ["onnx", pytest.param("tflite", marks=SLOW), pytest.param("coreml", marks=SLOW)]


@pytest.mark.parametrize("name", RUNTIMES)
def test_language_models_forward_and_steps_reproduce_the_golden_vectors(
    name: str, tmp_path: Path
) -> None:
    """The authors' GPT (nano), int64 token ids in: what Core ML stores as int32."""
    tensors = load_file(GOLDEN / "flowformer_gpt_nano.safetensors")
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight:")}
    vocab, width = weights["transformer.wte.weight"].shape
    block = weights["transformer.wpe.weight"].shape[0]
    model = FlowformerGPT(FlowformerGPTConfig(vocab, block, 3, 3, width)).eval()
    model.load_state_dict(weights)
    idx = next(v for k, v in tensors.items() if k.startswith("input:")).numpy()
    program = lowered(model, TensorSpec("idx", ("batch", idx.shape[1]), "int64"))
    target = TARGETS.get(name)
    artifact = target.convert(program, Options(), tmp_path)
    assert [s.dtype for s in artifact.inputs] == ["int64"]
    truth = tensors["output"].numpy()
    if isinstance(artifact.inputs[0].shape[0], int):  # one sample a run
        idx, truth = idx[:1], truth[:1]
    assert relative(steps(artifact, model, "idx", idx), truth) <= 1e-5
    with target.load(artifact) as session:
        assert relative(session.run({"idx": idx})["logits"], truth) <= 1e-5
        if name == "coreml":
            with pytest.raises(InputError, match="expected int32 ones: Core ML knows no int64"):
                session.run({"idx": idx + 2**40})


class Layer(torch.nn.Module):
    """One attention of a sequence with itself, of the authors' parameter names."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int, variant: FlowVariant) -> None:
        super().__init__()
        width, inside = weights["query_projection.weight"].T.shape
        self.attention = FlowAttention(width, inside, width, heads, variant)
        self.attention.load_state_dict(weights)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        return self.attention(queries, queries, queries)


@pytest.mark.parametrize(
    ("name", "precision", "bound"),
    [
        ("onnx", "fp32", 1e-5),
        pytest.param("tflite", "fp32", 1e-5, marks=SLOW),
        pytest.param("coreml", "fp32", 1e-5, marks=SLOW),
        ("coreml", "fp16", 3e-3),
    ],
)
def test_decision_transformers_attention_reproduces_the_golden_vectors(
    name: str, precision: str, bound: float, tmp_path: Path
) -> None:
    tensors = load_file(GOLDEN / "flow_attention_rl.safetensors")
    weights = {k[7:]: v.float() for k, v in tensors.items() if k.startswith("weight:")}
    x = tensors["input:queries"].float()
    assert torch.equal(x, tensors["input:keys"].float())
    heads = json.loads((GOLDEN / "attention_index.json").read_text())["flow_attention_rl"][
        "n_heads"
    ]
    program = lower(
        Layer(weights, heads, VARIANTS["rl"]).eval(),
        [TensorSpec("queries", ("batch", *x.shape[1:]))],
        ["output"],
        name="rl",
        ops=installed_ops(),
        precision=Precision(precision),
    )
    target = TARGETS.get(name)
    artifact = target.convert(program, Options(Precision(precision)), tmp_path)
    if precision == "fp16":
        assert artifact.form == "causal_means"
    truth = tensors["output"].numpy()
    with target.load(artifact) as session:
        rows = [session.run({"queries": x[i : i + 1].numpy()})["output"] for i in range(len(x))]
    assert relative(np.concatenate(rows), truth) <= bound


def step_of(name: str, folder: Path) -> tuple[CausalModel, Artifact]:
    torch.manual_seed(0)
    model = build_model("flowformer-causal-timeseries", **SIZES, num_layers=1, d_ff=8).eval()
    program = lowered(model, TensorSpec("x", ("batch", 8, 3)), precision=Precision.FP16)
    return model, TARGETS.get(name).convert(program, Options(Precision.FP16), folder)


@pytest.mark.parametrize("name", RUNTIMES)
def test_half_precision_keeps_the_state_in_float32(name: str, tmp_path: Path) -> None:
    model, artifact = step_of(name, tmp_path)
    assert {s.dtype for s in artifact.functions[STEP].state_specs} == {"float32"}
    x = np.random.default_rng(0).standard_normal((1, 600, 3)).astype(np.float32)
    truth = truth_of(model, x)
    values = steps(artifact, model, "x", x)
    assert relative(values, truth) <= 3e-3
    late = np.abs(values - truth)[:, -64:].max() / np.abs(truth).max()
    assert late <= 1e-3, "the error does not grow with the steps"
    if name == "coreml":
        assert artifact.details["kept_fp32"][STEP]["state"] > 20


def test_core_ml_functions_need_their_system(tmp_path: Path) -> None:
    _, program = classifier()
    options = Options(extra={"deployment_target": "iOS16"})
    with pytest.raises(InputError, match="deployment_target is iOS16; expected iOS18"):
        TARGETS.get("coreml").convert(program, options, tmp_path)
    assert not list(tmp_path.iterdir())


def test_programs_are_saved_with_their_functions(tmp_path: Path) -> None:
    _, program = classifier()
    program.save(tmp_path / "program.pt2")
    again = LoweredProgram.load(tmp_path / "program.pt2", installed_ops())
    assert list(again.functions) == list(program.functions) == ["forward_200", STEP]
    assert again.functions[STEP].state == program.functions[STEP].state != {}
    assert again.functions[STEP].outputs == program.functions[STEP].outputs
    assert len(again.attentions) == len(again.functions["forward_200"].attentions) == 1
    assert not again.functions[STEP].attentions
