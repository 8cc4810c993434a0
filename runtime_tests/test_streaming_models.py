"""Causal models: L steps equal one forward, the state is what its specs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flowexport_models import build_model
from flowexport_models.attention import FlowAttention
from flowexport_models.flowformer_gpt import FlowformerGPT, FlowformerGPTConfig
from flowexport_models.streaming import CausalModel
from safetensors.torch import load_file
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention import VARIANTS
from flowexport.ops.flow_attention.streaming import initial_state

GOLDEN = Path(__file__).parent / "golden"


def stream(model: CausalModel, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Run every step; require that the state keeps its names, shapes and dtype."""
    state = model.initial_state(len(x), dtype)
    specs = [(s.name, s.static(batch=len(x)).shape) for s in model.state_specs()]
    results = []
    for t in range(x.shape[1]):
        result, state = model.step(x[:, t], state)
        assert [(n, tuple(v.shape)) for n, v in state.items()] == specs
        results.append(result)
    assert state["t"].item() == x.shape[1]
    assert all(v.dtype is dtype for v in state.values())
    return torch.stack(results, 1)


def relative(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).abs().max() / truth.abs().max())


def classifier(length: int) -> CausalModel:
    torch.manual_seed(0)
    sizes = {"feat_dim": 5, "max_len": length, "num_classes": 4, "d_model": 16, "n_heads": 2}
    model = build_model("flowformer-causal-timeseries", **sizes, d_ff=16)
    assert isinstance(model, CausalModel)
    return model.eval()


@pytest.mark.parametrize("length", [1, 2, 29, 65, 300, 1024])
def test_steps_of_the_classifier_equal_one_forward(length: int) -> None:
    model = classifier(length)
    x = torch.randn(2 if length < 300 else 1, length, 5)
    with torch.no_grad():
        single = stream(model, x, torch.float32)
        model = model.double()
        truth = model(x.double())
        assert relative(stream(model, x.double(), torch.float64), truth) <= 1e-12
    assert relative(single, truth) <= 1e-5


def test_padding_behind_changes_nothing_before_it() -> None:
    model = classifier(9)
    x = torch.randn(1, 9, 5)
    other = x.clone()
    other[:, 6:] = 7.0
    with torch.no_grad():
        a, b = model(x), model(other)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])


def gpt() -> tuple[FlowformerGPT, dict[str, Tensor]]:
    tensors = load_file(GOLDEN / "flowformer_gpt_nano.safetensors")
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight:")}
    vocab, width = weights["transformer.wte.weight"].shape
    block = weights["transformer.wpe.weight"].shape[0]
    layers = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("transformer.h."))
    model = FlowformerGPT(FlowformerGPTConfig(vocab, block, layers, 3, width)).eval()
    model.load_state_dict(weights)
    return model, tensors


def test_steps_of_the_language_model_reproduce_the_golden_vectors() -> None:
    model, tensors = gpt()
    idx = next(v for k, v in tensors.items() if k.startswith("input:"))
    with torch.no_grad():
        single = stream(model, idx, torch.float32)
        double = stream(model.double(), idx, torch.float64)
    assert relative(double, tensors["output"]) <= 1e-12
    assert relative(single, tensors["output"]) <= 1e-5


def test_steps_of_a_language_model_equal_one_forward_at_1024_tokens() -> None:
    torch.manual_seed(0)
    model = FlowformerGPT(FlowformerGPTConfig(31, 1024, 2, 2, 16)).eval()
    idx = torch.randint(31, (1, 1024))
    with torch.no_grad():
        single = stream(model, idx, torch.float32)
        model = model.double()
        truth = model(idx)
        assert relative(stream(model, idx, torch.float64), truth) <= 1e-12
    assert relative(single, truth) <= 1e-5


def test_steps_of_the_decision_transformers_layer_reproduce_the_golden_vectors() -> None:
    config = json.loads((GOLDEN / "attention_index.json").read_text())["flow_attention_rl"]
    tensors = load_file(GOLDEN / "flow_attention_rl.safetensors")
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight:")}
    width = weights["query_projection.weight"].shape[1]
    heads = config.get("n_heads") or config["num_heads"]
    variant = VARIANTS["rl"]
    layer = FlowAttention(width, width, width, heads, variant).double()
    layer.load_state_dict(weights)
    x = tensors["input:queries"].double()
    state = initial_state(variant, len(x), heads, width // heads, width // heads, torch.float64)
    results = []
    with torch.no_grad():
        for t in range(x.shape[1]):
            result, state = layer.step(x[:, t], state)
            results.append(result)
    assert relative(torch.stack(results, 1), tensors["output"]) <= 1e-12


def test_wrong_states_and_sizes_are_told() -> None:
    model, other = classifier(9), classifier(9)
    state = model.initial_state(2)
    with pytest.raises(InputError, match=r"state k_mean has shape \(2, 2, 8\); expected \(1, 2, 8"):
        model.step(torch.randn(1, 5), {**state, "frames": torch.zeros(1, 2, 5)})
    assert other.max_steps is None and gpt()[0].max_steps is not None
    sizes = {"feat_dim": 5, "max_len": 9, "num_classes": 4}
    with pytest.raises(InputError, match="clamp is null"):
        build_model("flowformer-causal-timeseries", **sizes, clamp=None)
    with pytest.raises(InputError, match="window is 1; expected an integer >= 2"):
        build_model("flowformer-causal-timeseries", **sizes, window=1)
