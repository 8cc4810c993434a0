"""Lowering: one node per attention, names and dynamic sizes kept, decomposition exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flowexport.core.errors import LoweringError
from flowexport.core.types import Precision, TensorSpec
from flowexport.lowering import LoweredProgram, decompose, find_attentions, lower
from flowexport.ops.flow_attention import VARIANTS, flow_attention
from flowexport.ops.flow_attention.lowered import DESCRIPTOR

SPEC = TensorSpec("x", ("batch", 6, 8))


class Layer(nn.Module):
    """A fused-qkv attention layer of two heads."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = VARIANTS[variant]
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return self.drop(self.proj(flow_attention(q, k, v, self.variant).flatten(2)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Layer("vision")
        self.second = Layer("causal")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return y, self.second(y)


def lowered(module: nn.Module, names: list[str], **options: object) -> LoweredProgram:
    return lower(module, [SPEC], names, name="tiny", ops=[DESCRIPTOR], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two() -> tuple[nn.Module, LoweredProgram]:
    torch.manual_seed(0)
    module = Two()
    return module, lowered(module, ["y", "z"], labels=["a", "b"], preprocessing={"scale": 2.0})


def test_attention_sites_carry_path_shapes_and_variant(
    two: tuple[nn.Module, LoweredProgram],
) -> None:
    program = two[1]
    assert [s.module_path for s in program.attentions] == ["first", "second"]
    assert {s.q_shape for s in program.attentions} == {("batch", 6, 2, 4)}
    causal = [s.arguments[4] for s in program.attentions]
    assert causal == [False, True]
    assert [(o.name, o.shape) for o in program.outputs] == [
        ("y", ("batch", 6, 8)),
        ("z", ("batch", 6, 8)),
    ]


def test_dropout_is_gone(two: tuple[nn.Module, LoweredProgram]) -> None:
    _, program = two
    x = torch.randn(3, 6, 8)
    first, again = program.exported.module()(x), program.exported.module()(x)
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("batch", [1, 3])
def test_decomposed_program_computes_the_same(
    two: tuple[nn.Module, LoweredProgram], batch: int
) -> None:
    module, program = two
    plain, choices = decompose(program, "onnx", [DESCRIPTOR])
    assert len(choices) == 2 and all(c.form and c.reason for c in choices)
    assert find_attentions(plain.exported, [DESCRIPTOR]) == ()
    x = torch.randn(batch, 6, 8)
    with torch.no_grad():
        for ours, truth in zip(plain.exported.module()(x), module(x), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


def test_saved_program_is_the_same(two: tuple[nn.Module, LoweredProgram], tmp_path: Path) -> None:
    program = two[1]
    program.save(tmp_path / "p.pt2")
    again = LoweredProgram.load(tmp_path / "p.pt2", [DESCRIPTOR])
    assert replace(again, exported=program.exported) == program
    x = torch.randn(2, 6, 8)
    for a, b in zip(again.exported.module()(x), program.exported.module()(x), strict=True):
        assert torch.equal(a, b)


def test_half_program_keeps_float32_at_its_ends() -> None:
    program = lowered(Layer("vision"), ["y"], precision=Precision.FP16)
    assert program.outputs[0].dtype == "float32"
    weights = {v.dtype for v in program.exported.state_dict.values()}
    assert weights == {torch.float16}
    assert program.exported.module()(torch.randn(2, 6, 8)).dtype == torch.float32


def test_half_program_has_the_module_paths_of_the_model() -> None:
    program = lowered(Two(), ["y", "z"], precision=Precision.FP16)
    assert [s.module_path for s in program.attentions] == ["first", "second"]


def test_wrong_number_of_outputs_is_told() -> None:
    with pytest.raises(LoweringError, match=r"2 results; expected 1 \(y\)"):
        lowered(Two(), ["y"])


def test_unknown_pinned_form_names_the_valid(two: tuple[nn.Module, LoweredProgram]) -> None:
    with pytest.raises(LoweringError, match=r"'nonsense'; expected one of .*published"):
        decompose(two[1], "onnx", [DESCRIPTOR], pinned="nonsense")


def test_data_dependent_model_is_refused_in_one_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(LoweringError, match=r"torch\.export refused") as caught:
        lowered(Branches(), ["y"])
    assert "\n" not in caught.value.message
