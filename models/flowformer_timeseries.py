"""Flowformer for multivariate time series: a post-norm encoder and a flattening head.

Paper: Wu et al., *Flowformer: Linearizing Transformers with Conservation
Flows*, ICML 2022 (arXiv 2202.06258), section 4.4 (UEA archive). State-dict
names and numerics follow the authors' code (github.com/thuml/Flowformer,
Flowformer_TimeSeries), so their checkpoints load. As there, padding is not
masked inside the attention; the head zeroes padded steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from flowexport_models.attention import FlowAttention
from flowexport_models.config import (
    check_choice,
    check_heads,
    check_int,
    check_number,
    clamp_bounds,
)
from torch import Tensor, nn
from torch.nn import functional as F

from flowexport.core.errors import InputError
from flowexport.core.types import TensorSpec
from flowexport.ops.flow_attention import VARIANTS

FAMILY = "flowformer-timeseries"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
POSITIONS = ("learnable", "fixed")


@dataclass(frozen=True)
class FlowformerTimeSeriesConfig:
    """Sizes of a time-series Flowformer.

    Attributes:
        feat_dim: channels of the series.
        max_len: steps; shorter series are zero-padded.
        d_model: channels inside; even with ``fixed`` positions.
        n_heads: attention heads.
        num_layers: encoder layers.
        d_ff: hidden width of the pointwise convolutions.
        num_classes: logits.
        dropout: in training.
        pos_encoding: ``learnable`` or ``fixed`` (sinusoidal).
        activation: ``gelu`` or ``relu``.
        clamp: bounds of the conserved source flow; the authors' code has none here.
    """

    feat_dim: int
    max_len: int
    num_classes: int
    d_model: int = 512
    n_heads: int = 8
    num_layers: int = 3
    d_ff: int = 512
    dropout: float = 0.0
    pos_encoding: str = "fixed"
    activation: str = "gelu"
    clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("feat_dim", "max_len", "num_classes", "d_model", "n_heads", "num_layers"):
            check_int(FAMILY, name, getattr(self, name))
        check_int(FAMILY, "d_ff", self.d_ff)
        check_number(FAMILY, "dropout", self.dropout, 0, 0.99)
        check_choice(FAMILY, "pos_encoding", self.pos_encoding, POSITIONS)
        check_choice(FAMILY, "activation", self.activation, sorted(ACTIVATIONS))
        check_heads(FAMILY, "d_model", self.d_model, self.n_heads)
        object.__setattr__(self, "clamp", clamp_bounds(FAMILY, self.clamp))
        if self.pos_encoding == "fixed" and self.d_model % 2:
            raise InputError(
                f"build {FAMILY}: d_model is {self.d_model}; expected an even number"
                " with fixed positions."
            )

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of an exported model's inputs; the mask is 1 on real steps."""
        return (
            TensorSpec("x", ("batch", self.max_len, self.feat_dim)),
            TensorSpec("padding_mask", ("batch", self.max_len)),
        )


class PointwiseConv1d(nn.Linear):
    """A 1x1 Conv1d computed as a Linear on (B, N, C): no transposes in the graph.

    Its state dict holds the convolution's (out, in, 1) weight, as checkpoints do.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.register_state_dict_post_hook(_to_conv_weight)
        self.register_load_state_dict_pre_hook(_to_linear_weight)


def _to_conv_weight(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].unsqueeze(-1)


def _to_linear_weight(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any
) -> None:
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.dim() == 3 and weight.shape[2] == 1:
        state[f"{prefix}weight"] = weight.squeeze(-1)


class PositionalEncoding(nn.Module):
    """Add a learnable or sinusoidal ``pe`` (max_len, 1, d_model) to (B, max_len, d_model)."""

    def __init__(self, config: FlowformerTimeSeriesConfig) -> None:
        super().__init__()
        length, width = config.max_len, config.d_model
        if config.pos_encoding == "learnable":
            self.pe = nn.Parameter(torch.empty(length, 1, width).uniform_(-0.02, 0.02))
        else:
            position = torch.arange(length, dtype=torch.float32)[:, None]
            rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
            waves = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)
            self.register_buffer("pe", waves.reshape(length, 1, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        pe = self.pe if x.shape[1] == len(self.pe) else self.pe[: x.shape[1]]
        return self.dropout(x + pe.transpose(0, 1))


class EncoderLayer(nn.Module):
    """Attention and two pointwise convolutions, each with a residual and a LayerNorm after it."""

    def __init__(self, config: FlowformerTimeSeriesConfig) -> None:
        super().__init__()
        width = config.d_model
        self.attention = FlowAttention(
            width, width, width, config.n_heads, replace(VARIANTS["timeseries"], clamp=config.clamp)
        )
        self.conv1 = PointwiseConv1d(width, config.d_ff)
        self.conv2 = PointwiseConv1d(config.d_ff, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, x, x)))
        y = self.dropout(self.activation(self.conv1(x)))
        return self.norm2(x + self.dropout(self.conv2(y)))


class Encoder(nn.Module):
    """Encoder layers and a last LayerNorm."""

    def __init__(self, config: FlowformerTimeSeriesConfig) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.attn_layers:
            x = layer(x)
        return self.norm(x)


class FlowformerTimeSeries(nn.Module):
    """Time-series classifier (arXiv 2202.06258, section 4.4).

    Args:
        config: the sizes.
    """

    def __init__(self, config: FlowformerTimeSeriesConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = math.sqrt(config.d_model)
        self.project_inp = nn.Linear(config.feat_dim, config.d_model)
        self.pos_enc = PositionalEncoding(config)
        self.encoder = Encoder(config)
        self.act = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.output_layer = nn.Linear(config.d_model * config.max_len, config.num_classes)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """Classify.

        Args:
            x: (B, N, feat_dim), float, zero on padded steps; N = max_len, or fewer, which
                is another model: the attention sees less padding.
            padding_mask: (B, N), bool or float; 1 on real steps, 0 on padded ones.

        Returns:
            Logits (B, num_classes).

        Raises:
            InputError: N exceeds max_len.
        """
        length, longest = x.shape[1], self.config.max_len
        if length > longest:
            raise InputError(
                f"run {FAMILY}: x has {length} steps; expected at most {longest} (max_len)."
            )
        hidden = self.pos_enc(self.project_inp(x) * self.scale)
        hidden = self.dropout(self.act(self.encoder(hidden)))
        hidden = hidden * padding_mask.to(hidden.dtype).unsqueeze(-1)
        if length == longest:
            return self.output_layer(hidden.flatten(1))
        # Steps that are not there weigh as padded ones: nothing.
        weight = self.output_layer.weight[:, : length * self.config.d_model]
        return F.linear(hidden.flatten(1), weight, self.output_layer.bias)


def flowformer_timeseries(**config: Any) -> FlowformerTimeSeries:
    """Build a time-series Flowformer; keywords as :class:`FlowformerTimeSeriesConfig`."""
    return FlowformerTimeSeries(FlowformerTimeSeriesConfig(**config))


def flowformer_timeseries_japanese_vowels(**config: Any) -> FlowformerTimeSeries:
    """Build the UEA JapaneseVowels model: 12 channels, at most 29 steps, 9 speakers."""
    sizes: dict[str, Any] = {
        "feat_dim": 12,
        "max_len": 29,
        "num_classes": 9,
        "d_model": 128,
        "n_heads": 8,
        "num_layers": 3,
        "d_ff": 256,
        "dropout": 0.1,
        "pos_encoding": "fixed",
    }
    return flowformer_timeseries(**{**sizes, **config})
