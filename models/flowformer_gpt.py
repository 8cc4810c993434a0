"""Flowformer as a causal language model: GPT with causal Flow-Attention.

Paper: Wu et al., *Flowformer: Linearizing Transformers with Conservation
Flows*, ICML 2022 (arXiv 2202.06258). State-dict names and size names follow the
authors' flowformergpt (github.com/thuml/Flowformer, Flowformer_TorchModule).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

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

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import TensorSpec
from flowexport.ops.flow_attention import VARIANTS
from flowexport.ops.flow_attention.streaming import FlowState

FAMILY = "flowformer-gpt"


@dataclass(frozen=True)
class FlowformerGPTConfig:
    """Sizes of a causal language model.

    Attributes:
        vocab_size: tokens.
        block_size: the longest sequence.
        n_layer, n_head, n_embd: blocks, heads, channels.
        dropout: of embeddings, attention and MLP, in training.
        clamp: bounds of the conserved source flow, or None.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.1
    clamp: tuple[float, float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            check_int(FAMILY, name, getattr(self, name))
        check_number(FAMILY, "dropout", self.dropout, 0, 0.99)
        check_heads(FAMILY, "n_embd", self.n_embd, self.n_head)
        object.__setattr__(self, "clamp", clamp_bounds(FAMILY, self.clamp))

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of an exported model's inputs, at the full length."""
        return (TensorSpec("idx", ("batch", self.block_size), "int64"),)


class Mlp(nn.Module):
    """Linear, GELU (tanh form, as GPT-2), Linear."""

    def __init__(self, config: FlowformerGPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, config: FlowformerGPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FlowAttention(
            width, width, width, config.n_head, replace(VARIANTS["causal"], clamp=config.clamp)
        )
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.dropout(self.attn(y, y, y))
        return x + self.mlp(self.ln_2(x))

    def step(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        """Compute one token, (B, n_embd), and the next state."""
        y, state = self.attn.step(self.ln_1(x), state)
        x = x + y
        return x + self.mlp(self.ln_2(x)), state


class FlowformerGPT(CausalModel):
    """Causal language model.

    Args:
        config: the sizes.
    """

    def __init__(self, config: FlowformerGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.max_steps = config.block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_init_weights)
        for block in self.transformer["h"]:
            nn.init.normal_(block.mlp.c_proj.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx: Tensor) -> Tensor:
        """Predict each next token.

        Args:
            idx: (B, L), integer, L <= block_size.

        Returns:
            Logits (B, L, vocab_size).

        Raises:
            InputError: the sequence is longer than ``block_size``.
        """
        if idx.shape[1] > self.config.block_size:
            raise InputError(
                f"run {FAMILY}: idx has {idx.shape[1]} tokens;"
                f" expected at most {self.config.block_size}."
            )
        positions = self.transformer["wpe"].weight[: idx.shape[1]]
        x = self.transformer["drop"](self.transformer["wte"](idx) + positions)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    def _blocks(self) -> list[Block]:
        blocks: Any = self.transformer["h"]
        return list(blocks)

    def state_specs(self) -> tuple[TensorSpec, ...]:
        layers = (
            spec
            for i, block in enumerate(self._blocks())
            for spec in attention_specs(f"layer{i}", block.attn)
        )
        return (*layers, TensorSpec(STEPS_SEEN, (1,)))

    def step(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict the next token from one, (B,) integer, and all before it.

        Returns:
            Logits (B, vocab_size), and the next state. The caller keeps the
            stream within ``block_size``: a graph cannot refuse a position.
        """
        position = self.transformer["wpe"](state[STEPS_SEEN].long())
        hidden = self.transformer["wte"](x) + position
        following: dict[str, Tensor] = {}
        for i, block in enumerate(self._blocks()):
            hidden, own = block.step(hidden, attention_state(f"layer{i}", state))
            following |= named_state(f"layer{i}", own)
        following[STEPS_SEEN] = state[STEPS_SEEN] + 1
        return self.lm_head(self.transformer["ln_f"](hidden)), following


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


SIZES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        # n_layer, n_head, n_embd
        "openai-gpt": (12, 12, 768),
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
        "gopher-44m": (8, 16, 512),
        "gpt-mini": (6, 6, 192),
        "gpt-micro": (4, 4, 128),
        "gpt-nano": (3, 3, 48),
    }
)
"""The authors' sizes, without their ``flowformer-`` before each name."""


def flowformer_gpt(
    size: str, *, vocab_size: int = 50257, block_size: int = 1024, **config: Any
) -> FlowformerGPT:
    """Build a named size of :data:`SIZES`; other keywords as :class:`FlowformerGPTConfig`."""
    name = size.removeprefix("flowformer-")
    if name not in SIZES:
        raise UnknownNameError("size", size, SIZES, where=f"build {FAMILY}")
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[name], strict=True))
    return FlowformerGPT(
        FlowformerGPTConfig(
            **{"vocab_size": vocab_size, "block_size": block_size, **sizes, **config}
        )
    )
