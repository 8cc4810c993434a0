"""Small programs that the ONNX and the TensorRT tests convert."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from flowexport.core.types import Dim, Precision, TensorSpec
from flowexport.lowering import LoweredProgram, lower
from flowexport.ops.flow_attention import VARIANTS, flow_attention
from flowexport.ops.installed import installed_ops

LENGTH, WIDTH, CLASSES = 12, 16, 4


class Attend(nn.Module):
    """One attention with its projections."""

    def __init__(self, variant: str, heads: int) -> None:
        super().__init__()
        self.variant, self.heads = VARIANTS[variant], heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return flow_attention(q, k, v, self.variant).flatten(2)


class Net(nn.Module):
    """Two attentions, by default of one variant and different head widths."""

    def __init__(self, first: str, second: str | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one = Attend(first, 2)
        self.two = Attend(second or first, 4)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(self.norm(x))
        return self.head((x + self.two(x)).mean(dim=1))


class Plain(nn.Module):
    """A module of somebody else's, with no attention of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.GELU(), nn.Flatten(1)
        )
        self.head = nn.Linear(8 * 10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def net(first: str, second: str | None = None) -> Net:
    torch.manual_seed(5)
    return Net(first, second).eval()


def program(
    module: nn.Module,
    name: str,
    precision: Precision = Precision.FP32,
    shape: tuple[Dim, ...] = ("batch", LENGTH, WIDTH),
) -> LoweredProgram:
    return lower(
        copy.deepcopy(module),
        [TensorSpec("x", shape)],
        ["logits"],
        name=name,
        ops=installed_ops(),
        precision=precision,
        labels=("a", "b", "c", "ü"),
        preprocessing={"scale": 0.5, "mean": [1, 2]},
        recipe_sha256="cd" * 32,
    )


def sample(batch: int, length: int = LENGTH, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(batch + length)
    return rng.standard_normal((batch, length, width)).astype(np.float32)


def truth(module: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = copy.deepcopy(module).double()(torch.from_numpy(x).double()).numpy()
    return result


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error as a fraction of the largest expected value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
