"""The attention-level golden vectors: the authors' layers, run in double precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowexport.ops.flow_attention import VARIANTS, FlowVariant

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "flow_attention_self": "standard",
    "flow_attention_cross": "standard",
    "flow_attention_causal": "causal",
    "flow_attention_rl": "rl",
    "flow_attention_nlp": "nlp",
    "flow_attention_lra": "lra",
    "mobile_attention": "mobile",
}
Attention = Callable[[Tensor, Tensor, Tensor, FlowVariant], Tensor]


def golden_error(case: str, attention: Attention, dtype: torch.dtype) -> float:
    """Return the largest error of one case over its largest output."""
    variant = VARIANTS[CASES[case]]
    config = json.loads((GOLDEN / "attention_index.json").read_text())[case]
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    weights = {k[7:]: v.to(dtype) for k, v in tensors.items() if k.startswith("weight:")}
    inputs = {k[6:]: v.to(dtype) for k, v in tensors.items() if k.startswith("input:")}
    truth = tensors["output"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    if case == "flow_attention_lra":
        result = attention(inputs["query"], inputs["key"], inputs["value"], variant)
    else:
        if case == "flow_attention_nlp":  # (T, B, C)
            x = inputs["query"].transpose(0, 1)
            sources: tuple[Tensor, ...] = (x, x, x)
            names = ("q_proj", "k_proj", "v_proj", "out_proj")
        else:
            sources = (inputs["queries"], inputs["keys"], inputs["values"])
            names = tuple(f"{n}_projection" for n in ("query", "key", "value", "out"))
        heads = config.get("n_heads") or config["num_heads"]
        q, k, v = (
            linear(x, n).unflatten(-1, (heads, -1)) for x, n in zip(sources, names, strict=False)
        )
        result = linear(attention(q, k, v, variant).flatten(2), names[3])
        if case == "flow_attention_nlp":
            result = result.transpose(0, 1)
    assert result.shape == truth.shape
    return ((result.double() - truth).abs().max() / truth.abs().max()).item()
