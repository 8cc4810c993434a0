"""Each pass on a small model in float64: the same numbers, and what it promises of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flowexport.core.types import TensorSpec
from flowexport.lowering import LoweredProgram, decompose, lower
from flowexport.lowering.passes import after_decomposition, before_decomposition, clean
from flowexport.lowering.passes.constants import fold_constants
from flowexport.lowering.passes.dropout import remove_dropout
from flowexport.lowering.passes.layer_scale import fold_layer_scale
from flowexport.lowering.passes.norms import fold_norm_affine, spell_out_norms
from flowexport.lowering.passes.permutes import cancel_permutes, merge_heads_first
from flowexport.lowering.passes.projections import (
    NoMatch,
    project_channel_first,
    split_fused_projections,
)
from flowexport.ops.flow_attention import VARIANTS, flow_attention
from flowexport.ops.flow_attention.lowered import DESCRIPTOR

aten = torch.ops.aten
OVERLOADS = (DESCRIPTOR.overload,)
X = torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exported(module: nn.Module) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=8)
    return torch.export.export(module.double().eval(), (X,), dynamic_shapes=({0: batch},))


def same(before: ExportedProgram, after: ExportedProgram) -> None:
    for x in (X, X[:1]):
        torch.testing.assert_close(after.module()(x), before.module()(x), rtol=1e-12, atol=1e-12)


def targets(program: ExportedProgram) -> list[object]:
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def ranks(program: ExportedProgram) -> list[int]:
    values = [n.meta.get("val") for n in program.graph.nodes]
    return [v.dim() for v in values if isinstance(v, Tensor)]


class Attention(nn.Module):
    """Self-attention of two heads; ``fused`` says how q, k, v come from one Linear."""

    def __init__(self, fused: str, variant: str = "vision", bias: bool = True) -> None:
        super().__init__()
        self.fused, self.variant = fused, VARIANTS[variant]
        self.qkv = nn.Linear(8, 24, bias)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused == "unbind":
            q, k, v = self.qkv(x).reshape(x.shape[0], 6, 3, 2, 4).unbind(2)
        elif self.fused == "chunk":
            q, k, v = (p.unflatten(-1, (2, 4)) for p in self.qkv(x).chunk(3, -1))
        elif self.fused == "none":
            q, k, v = (f(x).unflatten(-1, (2, 4)) for f in (self.q, self.k, self.v))
        else:  # something between the layer and the heads
            q, k, v = (p.unflatten(-1, (2, 4)) for p in self.qkv(x).tanh().chunk(3, -1))
        return self.proj(flow_attention(q, k, v, self.variant).flatten(2))


def lowered(module: nn.Module) -> LoweredProgram:
    spec = TensorSpec("x", ("batch", 6, 8), "float64")
    return lower(module.double(), [spec], ["y"], name="tiny", ops=[DESCRIPTOR])


def test_dropout_goes_and_nothing_else() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.linear(self.drop(x)))

    before = exported(Module())
    after = remove_dropout(before)
    assert aten.dropout.default in targets(before)
    assert targets(after) == [aten.linear.default]
    same(before, after)


class Scaled(nn.Module):
    def __init__(self, bias: bool, left: bool, users: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias)
        self.gamma = nn.Parameter(torch.randn(8))
        self.left, self.users = left, users

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        scaled = self.gamma * y if self.left else y * self.gamma
        return x + scaled + (y if self.users > 1 else 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_layer_scale_becomes_part_of_the_linear_layer(bias: bool, left: bool) -> None:
    before = exported(Scaled(bias, left))
    after = fold_layer_scale(before)
    assert aten.mul.Tensor in targets(before) and aten.mul.Tensor not in targets(after)
    assert set(after.state_dict).isdisjoint({"gamma", "linear.weight"})
    same(before, after)


def test_layer_scale_stays_where_the_unscaled_result_is_used() -> None:
    before = exported(Scaled(True, True, users=2))
    after = fold_layer_scale(before)
    assert aten.mul.Tensor in targets(after)
    same(before, after)


def test_a_scale_over_tokens_is_no_layer_scale() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.randn(6, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.gamma

    before = exported(Module())
    after = fold_layer_scale(before)
    assert aten.mul.Tensor in targets(after)
    same(before, after)


class Normed(nn.Module):
    """A norm read by two linear layers, and by a residual where ``residual``."""

    def __init__(self, bias: bool, affine: bool, residual: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=affine)
        self.a, self.b = nn.Linear(8, 4, bias), nn.Linear(8, 8)
        self.residual = residual
        for p in self.norm.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.a(y), self.b(y) + (y if self.residual else x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_before_linear_layers_loses_scale_and_shift(bias: bool) -> None:
    before = exported(Normed(bias, affine=True, residual=False))
    after = fold_norm_affine(before)
    (norm,) = [n for n in after.graph.nodes if n.target == aten.layer_norm.default]
    assert norm.args[2:4] == (None, None)
    assert not any(name.startswith("norm.") for name in after.state_dict)
    same(before, after)


@pytest.mark.parametrize(("affine", "residual"), [(True, True), (False, False)])
def test_a_norm_that_others_read_or_a_plain_one_stays(affine: bool, residual: bool) -> None:
    before = exported(Normed(True, affine=affine, residual=residual))
    after = fold_norm_affine(before)
    assert set(after.state_dict) == set(before.state_dict)
    same(before, after)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_are_spelled_out(affine: bool) -> None:
    before = exported(Normed(True, affine=affine, residual=True))
    after = spell_out_norms(before)
    assert aten.layer_norm.default in targets(before)
    assert aten.layer_norm.default not in targets(after)
    assert targets(after).count(aten.mul.Tensor) == (3 if affine else 2)
    same(before, after)


def test_constants_fold_and_equal_ones_are_kept_once() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("pe", torch.randn(10, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            a = torch.ones(6, 6, dtype=x.dtype).tril()
            b = torch.ones(6, 6, dtype=x.dtype).tril()
            return a @ (b @ (x + self.pe[:6].transpose(0, 1)))

    before = exported(Module())
    after = fold_constants(before)
    assert targets(after) == [aten.add.Tensor, aten.matmul.default, aten.matmul.default]
    assert len(after.state_dict) == 2
    same(before, after)


def test_what_depends_on_the_batch_is_not_folded() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0], dtype=x.dtype)[:, None, None]

    before = exported(Module())
    same(before, fold_constants(before))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", ["unbind", "chunk"])
def test_fused_qkv_becomes_three_layers(fused: str, bias: bool) -> None:
    before = exported(Attention(fused, bias=bias))
    after = split_fused_projections(before, OVERLOADS)
    assert targets(after).count(aten.linear.default) == 4
    assert max(ranks(after)) == 4
    assert not {aten.unbind.int, aten.chunk.default, aten.split.Tensor} & set(targets(after))
    same(before, after)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", ["unbind", "chunk", "none"])
def test_projections_channels_first(fused: str, bias: bool) -> None:
    before = exported(Attention(fused, bias=bias))
    after, misses = project_channel_first(before, OVERLOADS, [True])
    assert misses == [None]
    assert targets(after).count(aten.matmul.default) == 3
    assert targets(after).count(aten.linear.default) == 1  # the one after the attention
    assert targets(after).count(aten.transpose.int) == 1  # x is transposed once
    same(before, after)


def test_what_does_not_match_says_why_and_is_unchanged() -> None:
    before = exported(Attention("tanh"))
    after, misses = project_channel_first(before, OVERLOADS, [True])
    assert isinstance(misses[0], NoMatch)
    assert misses[0].node and misses[0].reason == "not a linear layer"
    assert targets(after) == targets(before)
    _, choices = decompose(
        lowered(Attention("tanh")), "onnx", [DESCRIPTOR], pinned="channel_first_projected"
    )
    assert "not a linear layer" in choices[0].reason


def absorbed(module: nn.Module) -> tuple[list[object], str]:
    """Return the operators of a module in the absorbing form, and what is told of it."""
    program, (choice,) = decompose(
        lowered(module), "tflite", [DESCRIPTOR], pinned="channel_first_absorbed"
    )
    torch.testing.assert_close(program.exported.module()(X), module(X), rtol=1e-12, atol=1e-12)
    return targets(program.exported), choice.reason


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", ["timeseries", "lra", "mobile"])
def test_two_layers_go_into_the_products(variant: str, bias: bool) -> None:
    module = Attention("chunk", variant, bias)
    found, reason = absorbed(module)
    assert found.count(aten.linear.default) == 2 and "as written" not in reason
    module.proj = nn.Linear(8, 5, bias).double()
    found, _ = absorbed(module)
    assert found.count(aten.linear.default) == 2


def test_layers_that_others_read_are_not_absorbed() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)) for f in (self.q, self.k, self.v))
            y = flow_attention(q, k, v, self.variant).flatten(2)
            return self.proj(y) + (y if self.fused == "twice" else 0)

    class Gated(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)) for f in (self.q, self.k, self.v))
            return self.proj(flow_attention(q, k, v, self.variant).tanh().flatten(2))

    for module, layers, words in (
        (Twice("once"), 2, ""),
        (Twice("twice"), 4, "not read by one linear layer alone"),
        (Gated("none"), 4, "not merged for a linear layer"),
        (Attention("tanh"), 2, "not a linear layer"),
    ):
        found, reason = absorbed(module)
        assert found.count(aten.linear.default) == layers
        assert words in reason and ("as written" in reason) is bool(words)


def test_inverse_permutes_cancel_and_others_stay() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.unflatten(2, (2, 4)).permute(0, 3, 1, 2)
            return y.permute(0, 2, 3, 1).relu() + y.permute(0, 1, 3, 2).sum()

    before = exported(Module())
    after = cancel_permutes(before)
    assert targets(before).count(aten.permute.default) == 3
    assert targets(after).count(aten.permute.default) == 2
    same(before, after)


def test_heads_merge_before_the_transpose() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(1, 2).unflatten(1, (2, 4))  # (B, H, M, N)
            return y.permute(0, 3, 1, 2).reshape(x.shape[0], 6, 8)

    before = exported(Module())
    after = merge_heads_first(before)
    assert aten.permute.default in targets(before)
    assert aten.permute.default not in targets(after)
    same(before, after)


@pytest.mark.parametrize("fused", ["unbind", "chunk", "none", "tanh"])
@pytest.mark.parametrize("form", [f for f in DESCRIPTOR.forms if not f.startswith("causal_")])
def test_the_whole_way_in_every_form(fused: str, form: str) -> None:
    module = Attention(fused)
    plain, _ = decompose(lowered(module), "onnx", [DESCRIPTOR], pinned=form)
    if form != "published" and fused != "tanh":
        assert max(ranks(plain.exported)) <= 4
    for x in (X, X[:1]):
        torch.testing.assert_close(plain.exported.module()(x), module(x), rtol=1e-12, atol=1e-12)


def test_projected_form_needs_no_permute_before_the_core() -> None:
    program = lowered(Attention("chunk"))
    plain, _ = decompose(program, "onnx", [DESCRIPTOR], pinned="channel_first_projected")
    assert aten.permute.default not in targets(plain.exported)


def test_passes_do_nothing_to_a_model_without_their_patterns() -> None:
    before = exported(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    rewritten, misses = before_decomposition(clean(before), OVERLOADS, [])
    after = after_decomposition(rewritten)
    assert targets(after) == targets(before) and misses == []
    same(before, after)
