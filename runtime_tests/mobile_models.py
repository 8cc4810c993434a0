"""Small models that the TFLite and Core ML tests convert."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from flowexport.core.types import Precision, TensorSpec
from flowexport.lowering import LoweredProgram, lower
from flowexport.ops.flow_attention import VARIANTS, flow_attention
from flowexport.ops.installed import installed_ops

TOKENS, WIDTH, HEADS = 12, 16, 2
INPUTS = (TensorSpec("x", ("batch", TOKENS, WIDTH)), TensorSpec("padding_mask", ("batch", TOKENS)))
OUTPUTS = ("logits", "tokens")
LABELS = ("rest", "wave", "clap")


class Layer(nn.Module):
    """One attention of a variant between linear layers; two inputs, two results."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = VARIANTS[variant]
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, len(LABELS))
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x + self.position)
        q, k, v = self.qkv(y).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        y = flow_attention(q, k, v, self.variant).flatten(2) * mask.unsqueeze(-1)
        return self.head(nn.functional.gelu(y).mean(dim=1)), y


def layer(variant: str, seed: int = 5) -> Layer:
    torch.manual_seed(seed)
    return Layer(variant).eval()


def layer_program(variant: str, precision: Precision = Precision.FP32) -> LoweredProgram:
    return lower(
        layer(variant),
        INPUTS,
        OUTPUTS,
        name=f"layer-{variant}",
        ops=installed_ops(),
        precision=precision,
        labels=LABELS,
        preprocessing={"scale": 0.5},
        recipe_sha256="cd" * 32,
    )


def layer_feeds(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((1, TOKENS), np.float32)
    mask[:, 9:] = 0
    return {"x": rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32), "padding_mask": mask}


def truth(module: nn.Module, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the module's results in float64."""
    with torch.no_grad():
        results = module.double()(*(torch.from_numpy(feeds[s.name]).double() for s in INPUTS))
    return {n: r.numpy() for n, r in zip(OUTPUTS, results, strict=True)}


def largest_error(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of any output over that output's largest value."""
    assert set(got) == set(wanted)
    return max(float(np.abs(got[n] - w).max() / np.abs(w).max()) for n, w in wanted.items())
