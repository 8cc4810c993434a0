"""Flowformer for images: four stages of Flow-Attention blocks on shrinking token grids.

Paper: Wu et al., *Flowformer: Linearizing Transformers with Conservation
Flows*, ICML 2022 (arXiv 2202.06258). State-dict names, layer scale and ε follow
the authors' vision code (github.com/thuml/Flowformer, Flowformer_CV), so their
checkpoints load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from flowexport_models.attention import FusedFlowAttention
from flowexport_models.config import (
    check_heads,
    check_int,
    check_ints,
    check_number,
    clamp_bounds,
)
from torch import Tensor, nn

from flowexport.core.errors import InputError
from flowexport.core.types import TensorSpec
from flowexport.ops.flow_attention import VARIANTS

FAMILY = "flowformer-vision"


@dataclass(frozen=True)
class FlowformerVisionConfig:
    """Sizes of a vision Flowformer; the defaults are the ImageNet model.

    Attributes:
        img_size: height and width; a multiple of ``patch_size * 2 ** (stages - 1)``.
        patch_size: first convolution's kernel and stride; later stages halve the grid.
        in_channels: image channels.
        num_classes: logits.
        embed_dim: channels a stage.
        depth: blocks a stage.
        num_heads: heads a stage; one integer counts for all (the authors': 12).
        mlp_ratio: hidden width of the MLP over the channels, a stage.
        drop_rate: dropout after the MLP's layers, in training.
        init_values: first value of the MLP branch's layer scale.
        clamp: bounds of the conserved source flow, or None. The authors' first
            commit clamped to [-5, 5], their present code to [-1, 1].
    """

    img_size: int = 224
    patch_size: int = 4
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: tuple[int, ...] = (96, 192, 384, 768)
    depth: tuple[int, ...] = (3, 3, 10, 3)
    num_heads: int | tuple[int, ...] = 12
    mlp_ratio: tuple[int, ...] = (4, 4, 4, 4)
    drop_rate: float = 0.0
    init_values: float = 1e-3
    clamp: tuple[float, float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "in_channels", "num_classes"):
            check_int(FAMILY, name, getattr(self, name))
        check_ints(FAMILY, "embed_dim", self.embed_dim)
        for name in ("depth", "mlp_ratio"):
            check_ints(FAMILY, name, getattr(self, name), count=self.stages)
        if not isinstance(self.num_heads, int):
            check_ints(FAMILY, "num_heads", self.num_heads, count=self.stages)
        check_number(FAMILY, "drop_rate", self.drop_rate, 0, 0.99)
        check_number(FAMILY, "init_values", self.init_values, 0, 10)
        object.__setattr__(self, "clamp", clamp_bounds(FAMILY, self.clamp))
        for name in ("embed_dim", "depth", "mlp_ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for dim, heads in zip(self.embed_dim, self.heads, strict=True):
            check_int(FAMILY, "num_heads", heads)
            check_heads(FAMILY, "embed_dim", dim, heads)
        step = self.patch_size * 2 ** (self.stages - 1)
        if self.img_size % step:
            raise InputError(
                f"build {FAMILY}: img_size is {self.img_size}; expected a multiple of {step}"
                " (patch_size, halved once a stage)."
            )

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.embed_dim)

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of each stage."""
        if isinstance(self.num_heads, int):
            return (self.num_heads,) * self.stages
        return tuple(self.num_heads)

    def grid(self, stage: int) -> int:
        """Return a stage's tokens along one side of the image."""
        return self.img_size // self.patch_size // 2**stage

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of an exported model's inputs."""
        return (TensorSpec("image", ("batch", self.in_channels, self.img_size, self.img_size)),)


class PatchEmbed(nn.Module):
    """Cut an image into patches and embed each: (B, C, H, W) -> (B, tokens, dim)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Downsample(nn.Module):
    """Merge each 2x2 square of a token grid: (B, grid², C) -> (B, (grid/2)², dim)."""

    def __init__(self, grid: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.proj(image).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last axis."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm attention and MLP; the layer scale γ is on the MLP branch only, as published."""

    def __init__(self, config: FlowformerVisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = FusedFlowAttention(
            dim, config.heads[stage], replace(VARIANTS["vision"], clamp=config.clamp)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dim * config.mlp_ratio[stage], config.drop_rate)
        self.gamma = nn.Parameter(torch.full((dim,), float(config.init_values)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.gamma * self.mlp(self.norm2(x))


class FlowformerVision(nn.Module):
    """Image classifier (arXiv 2202.06258, section 4.3).

    Args:
        config: the sizes.

    Numerics: tokens and head widths fix the flows' magnitude N·D/4; at 3136
    tokens of width 8 the published form stays within float16, see attention.md.
    """

    def __init__(self, config: FlowformerVisionConfig) -> None:
        super().__init__()
        self.config = config
        dims = config.embed_dim
        embeds: list[nn.Module] = [PatchEmbed(config.in_channels, dims[0], config.patch_size)]
        embeds += [
            Downsample(config.grid(i), dims[i], dims[i + 1]) for i in range(config.stages - 1)
        ]
        self.patch_embed = nn.ModuleList(embeds)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid(0) ** 2, dims[0]))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(config, stage) for _ in range(config.depth[stage])))
            for stage in range(config.stages)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], config.num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Classify: image (B, in_channels, img_size, img_size), float -> logits (B, classes)."""
        x = self.patch_embed[0](image) + self.pos_embed
        x = self.blocks[0](x)
        for embed, blocks in zip(self.patch_embed[1:], self.blocks[1:], strict=True):
            x = blocks(embed(x))
        return self.head(self.norm(x).mean(1))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def flowformer_vision(**config: Any) -> FlowformerVision:
    """Build a vision Flowformer of any size; keywords as :class:`FlowformerVisionConfig`."""
    return FlowformerVision(FlowformerVisionConfig(**config))


def flowformer_vision_224(**config: Any) -> FlowformerVision:
    """Build the ImageNet model: 43.3 M parameters, 80.6 % top-1 in the paper."""
    return flowformer_vision(**config)


def flowformer_vision_digits(**config: Any) -> FlowformerVision:
    """Build the small model of 1x32x32 digits: 64, 16 and 4 tokens."""
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "in_channels": 1,
        "num_classes": 10,
        "embed_dim": (48, 96, 144),
        "depth": (1, 2, 1),
        "num_heads": (3, 6, 9),
        "mlp_ratio": (4, 4, 4),
        # So shallow a model learns sooner with its MLPs at work from the start.
        "init_values": 0.1,
    }
    return flowformer_vision(**{**sizes, **config})
