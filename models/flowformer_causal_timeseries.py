"""Causal Flowformer for time series: a classification after every frame.

Paper: Wu et al., *Flowformer: Linearizing Transformers with Conservation
Flows*, ICML 2022 (arXiv 2202.06258), its causal attention. The rest is ours: a
window of frames in place of positions, so that a stream has no longest length,
pre-norm layers, and a head on the running mean of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from flowexport_models.attention import FlowAttention
from flowexport_models.config import check_heads, check_int, check_number, clamp_bounds
from flowexport_models.streaming import (
    STEPS_SEEN,
    CausalModel,
    attention_specs,
    attention_state,
    named_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from flowexport.core.errors import InputError
from flowexport.core.types import TensorSpec
from flowexport.ops.flow_attention import VARIANTS
from flowexport.ops.flow_attention.causal_half import running_mean
from flowexport.ops.flow_attention.streaming import FlowState, as_dtype

FAMILY = "flowformer-causal-timeseries"


@dataclass(frozen=True)
class FlowformerCausalTimeSeriesConfig:
    """Sizes of a causal time-series Flowformer.

    Attributes:
        feat_dim: channels of a frame.
        max_len: frames of an exported ``forward``; a stream may be longer.
        num_classes: logits.
        d_model: channels inside.
        n_heads, num_layers, d_ff: of the encoder.
        window: frames that the first layer sees at once, the newest last.
        dropout: in training.
        clamp: bounds of the conserved source flow; a stream needs them.
    """

    feat_dim: int
    max_len: int
    num_classes: int
    d_model: int = 64
    n_heads: int = 4
    num_layers: int = 2
    d_ff: int = 128
    window: int = 3
    dropout: float = 0.0
    clamp: tuple[float, float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("feat_dim", "max_len", "num_classes", "d_model", "n_heads", "num_layers"):
            check_int(FAMILY, name, getattr(self, name))
        check_int(FAMILY, "d_ff", self.d_ff)
        check_int(FAMILY, "window", self.window, low=2)
        check_number(FAMILY, "dropout", self.dropout, 0, 0.99)
        check_heads(FAMILY, "d_model", self.d_model, self.n_heads)
        object.__setattr__(self, "clamp", clamp_bounds(FAMILY, self.clamp))
        if self.clamp is None:
            raise InputError(f"build {FAMILY}: clamp is null; expected [low, high].")

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of an exported ``forward``'s inputs."""
        return (TensorSpec("x", ("batch", self.max_len, self.feat_dim)),)


class CausalLayer(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, config: FlowformerCausalTimeSeriesConfig) -> None:
        super().__init__()
        width = config.d_model
        variant = replace(VARIANTS["causal"], clamp=config.clamp)
        self.norm1 = nn.LayerNorm(width)
        self.attention = FlowAttention(width, width, width, config.n_heads, variant)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.d_ff)
        self.fc2 = nn.Linear(config.d_ff, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return self._rest(x + self.dropout(self.attention(y, y, y)))

    def step(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        """Compute one step, (B, d_model), and the next state."""
        y, state = self.attention.step(self.norm1(x), state)
        return self._rest(x + y), state

    def _rest(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class FlowformerCausalTimeSeries(CausalModel):
    """Classifier that answers after every frame.

    State: ``frames`` (B, window − 1, feat_dim), the last frames; each layer's
    means; ``pool_mean`` (B, d_model), the mean over all steps; ``t``, their count.

    Args:
        config: the sizes.
    """

    def __init__(self, config: FlowformerCausalTimeSeriesConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.window * config.feat_dim, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify after every frame.

        Args:
            x: (B, L, feat_dim); padding behind the real frames changes nothing before it.

        Returns:
            Logits (B, L, num_classes): row t has seen the frames 0 to t.
        """
        length = x.shape[1]
        padded = F.pad(x, (0, 0, self.config.window - 1, 0))
        frames = [padded[:, i : i + length] for i in range(self.config.window)]
        hidden = self.dropout(self.project(torch.cat(frames, dim=-1)))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.dropout(running_mean(self.norm(hidden))))

    def _layers(self) -> list[CausalLayer]:
        return [layer for layer in self.layers if isinstance(layer, CausalLayer)]

    def state_specs(self) -> tuple[TensorSpec, ...]:
        config = self.config
        layers = (
            spec
            for i, layer in enumerate(self._layers())
            for spec in attention_specs(f"layer{i}", layer.attention)
        )
        return (
            TensorSpec("frames", ("batch", config.window - 1, config.feat_dim)),
            *layers,
            TensorSpec("pool_mean", ("batch", config.d_model)),
            TensorSpec(STEPS_SEEN, (1,)),
        )

    def step(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Classify after one more frame, (B, feat_dim) -> (B, num_classes), next state."""
        kept = state["frames"]
        frames = torch.cat([kept, as_dtype(x.unsqueeze(1), kept.dtype)], dim=1)
        following = {"frames": frames[:, 1:]}
        hidden = self.project(as_dtype(frames.flatten(1), x.dtype))
        for i, layer in enumerate(self._layers()):
            hidden, own = layer.step(hidden, attention_state(f"layer{i}", state))
            following |= named_state(f"layer{i}", own)
        t, mean = state[STEPS_SEEN] + 1, state["pool_mean"]
        following["pool_mean"] = mean + (as_dtype(self.norm(hidden), mean.dtype) - mean) / t
        following[STEPS_SEEN] = t
        return self.head(as_dtype(following["pool_mean"], x.dtype)), following


def flowformer_causal_timeseries(**config: Any) -> FlowformerCausalTimeSeries:
    """Build a model; keywords as :class:`FlowformerCausalTimeSeriesConfig`."""
    return FlowformerCausalTimeSeries(FlowformerCausalTimeSeriesConfig(**config))


def flowformer_causal_timeseries_japanese_vowels(**config: Any) -> FlowformerCausalTimeSeries:
    """Build the JapaneseVowels model: 12 channels, 29 frames, 9 speakers."""
    sizes: dict[str, Any] = {"feat_dim": 12, "max_len": 29, "num_classes": 9, "dropout": 0.1}
    return flowformer_causal_timeseries(**{**sizes, **config})
