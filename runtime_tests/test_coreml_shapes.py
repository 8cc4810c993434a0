"""Core ML packages of flexible lengths, and of the Neural Engine's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mobile_models import layer_program
from torch import nn

import flowexport
from flowexport.core.errors import (
    InputError,
)
from flowexport.core.types import Options, TensorSpec, Verdict
from flowexport.lowering import LoweredProgram, lower
from flowexport.ops.flow_attention import VARIANTS, flow_attention
from flowexport.ops.installed import installed_ops
from flowexport.targets.coreml import TARGET
from flowexport.targets.coreml.interpreter import Interpreter, InterpreterSession

pytest.importorskip("coremltools", reason="needs flowexport[coreml]")

RNG = np.random.default_rng(12)

# The layout of the Neural Engine.


class Blocks(nn.Module):
    """What the layout rewrites: position, norm, linear, GELU, residual, attention, pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 12, 8))
        self.norm, self.last = nn.LayerNorm(8, eps=1e-6), nn.LayerNorm(8, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2) + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).unbind(2)
        x = x + self.out(flow_attention(q, k, v, VARIANTS["vision"]).flatten(2))
        x = x + 0.5 * self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.last(x).mean(1)


def test_neural_engine_layout_computes_the_same(tmp_path: Path) -> None:
    spec = TensorSpec("image", ("batch", 3, 8, 6))
    program = lower(Blocks().eval(), [spec], ["y"], name="blocks", ops=installed_ops())
    image = RNG.normal(size=(1, 3, 8, 6)).astype(np.float32)
    with torch.no_grad():
        want = Blocks().eval().double()(torch.from_numpy(image).double()).numpy()
    operators = {}
    for layout in ("tokens", "ane"):
        options = Options(extra={"layout": layout})
        artifact = TARGET.convert(program, options, tmp_path / layout)
        got = Interpreter(artifact.path).run({"image": image})["y"]
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max(), layout
        operators[layout] = artifact.details["operators"]
    # Every linear layer over tokens is a convolution; the patches' own one stays.
    assert operators["tokens"]["conv"] == 1 and operators["tokens"]["linear"] >= 4
    assert operators["ane"]["conv"] == 1 + operators["tokens"]["linear"]
    assert "linear" not in operators["ane"] and "layer_norm" not in operators["ane"]


def test_scale_and_shift_are_not_written_as_a_batch_norm(tmp_path: Path) -> None:
    class Affine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            column = torch.arange(1.0, 5.0)[:, None, None]
            return x * column + column

    spec = TensorSpec("x", ("batch", 4, 3, 2))
    program = lower(Affine(), [spec], ["y"], name="affine", ops=())
    artifact = TARGET.convert(program, Options(), tmp_path)
    x = RNG.normal(size=(1, 4, 3, 2)).astype(np.float32)
    column = np.arange(1.0, 5.0)[:, None, None]
    # coremltools' own pass makes it a batch norm with ε = 1e-5, which is 5e-6 off.
    np.testing.assert_allclose(
        Interpreter(artifact.path).run({"x": x})["y"], x * column + column, rtol=1e-6, atol=1e-6
    )
    assert "batch_norm" not in artifact.details["operators"]


# Flexible lengths.


class Pooled(nn.Module):
    """One attention over any number of steps, pooled."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.variant = VARIANTS[variant]
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        y = flow_attention(q, k, v, self.variant).flatten(2) * mask.unsqueeze(-1)
        return self.head(y.mean(1))


def pooled_program(variant: str) -> LoweredProgram:
    inputs = [
        TensorSpec("x", ("batch", "length", 8)),
        TensorSpec("padding_mask", ("batch", "length")),
    ]
    return lower(Pooled(variant).eval(), inputs, ["y"], name="pooled", ops=installed_ops())


@pytest.mark.parametrize(
    ("variant", "flexible", "refused"),
    [
        ("timeseries", {"length": {"range": [4, 40]}}, (3, 41)),
        ("causal", {"length": {"sizes": [4, 9, 40]}}, (8,)),
    ],
)
def test_flexible_lengths(
    variant: str, flexible: dict[str, Any], refused: tuple[int, ...], tmp_path: Path
) -> None:
    options = Options(extra={"flexible": flexible})
    artifact = TARGET.convert(pooled_program(variant), options, tmp_path)
    assert artifact.inputs[0].shape == (1, "length", 8)
    # Two enumerated inputs need iOS 18, a range does not.
    assert artifact.details["deployment_target"] == (
        "iOS18" if "sizes" in str(flexible) else "iOS16"
    )
    module = Pooled(variant).eval().double()

    def feeds(length: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(length)
        x = draw.standard_normal((1, length, 8)).astype(np.float32)
        return {"x": x, "padding_mask": np.ones((1, length), np.float32)}

    with InterpreterSession(artifact) as session:
        for length in (4, 9, 40):
            given = feeds(length)
            with torch.no_grad():
                want = module(*(torch.from_numpy(v).double() for v in given.values())).numpy()
            got = session.run(given)["y"]
            assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max(), length
        for length in refused:
            with pytest.raises(InputError, match="x has shape"):
                session.run(feeds(length))


def test_flexible_must_name_the_dimensions(tmp_path: Path) -> None:
    for program, named in (
        (pooled_program("vision"), "steps"),
        (layer_program("vision"), "length"),
    ):
        options = Options(extra={"flexible": {named: {"range": [4, 8]}}})
        with pytest.raises(InputError, match=f"flexible has {named}, and the inputs have"):
            TARGET.convert(program, options, tmp_path)


def test_what_a_deployment_target_lacks_is_refused(tmp_path: Path) -> None:
    sizes = {"flexible": {"length": {"sizes": [4, 8]}}, "deployment_target": "iOS17"}
    with pytest.raises(InputError, match="is iOS17; expected iOS18, the first with several inputs"):
        TARGET.convert(pooled_program("vision"), Options(extra=sizes), tmp_path)
    assert not list(tmp_path.iterdir())


FLEXIBLE_MODEL = """
import torch
from torch import nn
from flowexport.ops.flow_attention import VARIANTS, flow_attention

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return self.head(flow_attention(q, k, v, VARIANTS["timeseries"]).flatten(2).mean(1))

def build():
    return Tiny()
"""


@pytest.mark.slow
def test_a_flexible_bundle_is_verified_at_several_lengths(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(FLEXIBLE_MODEL)
    (tmp_path / "r.yaml").write_text(
        "schema: flowexport.recipe/1\nmodel: m.py:build\ninputs: {x: batchxlengthx8}\n"
        "targets: {coreml: {flexible: {length: {range: [4, 40]}}}}\n"
    )
    result = flowexport.convert(tmp_path / "r.yaml", out=tmp_path / "out", bench=False)
    assert result.verdict is Verdict.PASS
    lengths = {c.case.rpartition("-")[2] for c in result.parity["coreml"].cases}
    assert lengths == {"4", "22", "40"}
