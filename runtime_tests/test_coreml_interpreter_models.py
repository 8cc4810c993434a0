"""Flowformers as Core ML packages, interpreted: parity in every mode, half-precision hazards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ct = pytest.importorskip("coremltools", reason="coremltools is not installed")

from flowexport.core.types import Precision, TensorSpec  # noqa: E402
from flowexport.lowering import decompose, lower  # noqa: E402
from flowexport.ops.flow_attention import (  # noqa: E402
    VARIANTS,
    flow_attention,
    flow_attention_reference,
)
from flowexport.ops.flow_attention.lowered import DESCRIPTOR, FORMS  # noqa: E402
from flowexport.targets.coreml.convert import to_package  # noqa: E402
from flowexport.targets.coreml.interpreter import (  # noqa: E402
    Interpreter,
    Mode,
    operator_stats,
)
from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic  # noqa: E402

HALF_FORM = "means"


class Block(nn.Module):
    """Norm, attention with its projections, residual, feed-forward."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.variant = VARIANTS[variant]
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 2, 8).unbind(2)
        x = x + self.out(flow_attention(q, k, v, self.variant).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Layer(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flow_attention(q, k, v, VARIANTS["vision"])


def package(
    module: nn.Module, inputs: Sequence[TensorSpec], form: str, precision: Precision, folder: Path
) -> Path:
    program = lower(module, inputs, ["y"], name="small", ops=[DESCRIPTOR])
    decomposed, _ = decompose(program, "coreml", [DESCRIPTOR], pinned=form)
    path = folder / f"{form}-{precision.value}.mlpackage"
    to_package(decomposed, precision, "iOS16", path)
    return path


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


TOKENS = TensorSpec("x", (1, 64, 16))


@pytest.fixture(scope="module")
def block_packages(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Precision], Path]:
    return {
        (variant, precision): package(
            Block(variant), [TOKENS], "published", precision, tmp_path_factory.mktemp(variant)
        )
        for variant in ("vision", "timeseries", "causal")
        for precision in (Precision.FP32, Precision.FP16)
    }


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", ["vision", "timeseries", "causal"])
@pytest.mark.parametrize("mode", Mode)
def test_block_in_every_mode(
    block_packages: dict[tuple[str, Precision], Path],
    tokens: torch.Tensor,
    variant: str,
    mode: Mode,
) -> None:
    with torch.no_grad():
        want = Block(variant).eval()(tokens).numpy()
    feeds = {"x": tokens.numpy()}
    single = Interpreter(block_packages[variant, Precision.FP32], mode=mode).run(feeds)["y"]
    # A float32 program has nothing that a half mode may round.
    assert relative_l2(single, want) <= 1e-6
    half = Interpreter(block_packages[variant, Precision.FP16], mode=mode).run(feeds)["y"]
    # float16 has 11 bits: 4.9e-4 a rounding; weights alone give some 1e-4 in exact mode.
    assert 1e-5 < relative_l2(half, want) < (5e-4 if mode is Mode.EXACT else 2e-3)


def test_values_come_in_order_and_end_in_the_output(
    block_packages: dict[tuple[str, Precision], Path], tokens: torch.Tensor
) -> None:
    path, feeds = block_packages["vision", Precision.FP16], {"x": tokens.numpy()}
    interpreter = Interpreter(path, mode="fp16")
    values = list(interpreter.run_with_values(feeds))
    assert len(values) == interpreter.operators.total()
    projection = next(v for v in values if v.op_type == "linear")
    assert projection.array.shape[:2] == (1, 64)
    assert projection.module_path is None
    # The converter's suffix does not hide a path that is known by the graph's name.
    known = {projection.output_name.removesuffix("_cast_fp16"): "qkv"}
    again = Interpreter(path, mode="fp16", module_paths=known).run_with_values(feeds)
    assert next(v.module_path for v in again if v.op_type == "linear") == "qkv"
    assert values[-1].output_name == "y"
    np.testing.assert_array_equal(values[-1].array, interpreter.run(feeds)["y"])
    for value in values:
        if interpreter.declared_dtype(value.output_name) == "float16":
            rounded = value.array.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(value.array, rounded)


def test_progress_counts_to_the_end(
    block_packages: dict[tuple[str, Precision], Path], tokens: torch.Tensor
) -> None:
    interpreter = Interpreter(block_packages["vision", Precision.FP32])
    seen: list[tuple[int, int]] = []
    interpreter.run(
        {"x": tokens.numpy()}, progress=lambda done, total, op: seen.append((done, total))
    )
    total = interpreter.operators.total()
    assert seen == [(i + 1, total) for i in range(total)]


def test_running_does_not_change_feeds_or_constants(
    block_packages: dict[tuple[str, Precision], Path], tokens: torch.Tensor
) -> None:
    feeds = {"x": tokens.numpy().copy()}
    interpreter = Interpreter(block_packages["causal", Precision.FP16], mode="ftz")
    first = interpreter.run(feeds)["y"]
    np.testing.assert_array_equal(feeds["x"], tokens.numpy())
    kept = first.copy()
    first += 1
    np.testing.assert_array_equal(interpreter.run(feeds)["y"], kept)


# Hazards of the published form in half precision (coreml.md).

HAZARDS = {"448x448 first stage": (12544, 8, 0.0), "1024 warm tokens of width 64": (1024, 64, 1.0)}


@pytest.fixture(scope="module", params=HAZARDS)
def hazard(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, np.ndarray], np.ndarray]:
    """Packages of one attention layer by form, its inputs, and the result in float64."""
    size, width, shift = HAZARDS[request.param]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        (torch.randn(1, size, 1, width, generator=draw) + s).half().float()
        for s in (shift, shift, 0.0)
    )
    want = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS["vision"])
    specs = [TensorSpec(n, (1, size, 1, width)) for n in ("q", "k", "v")]
    folder = tmp_path_factory.mktemp("hazard")
    paths = {
        form: package(Layer(), specs, form, Precision.FP16, folder)
        for form in ("published", HALF_FORM)
        if form in FORMS
    }
    return paths, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()}, want.numpy()


def test_published_form_is_right_per_operator_and_fails_when_subnormals_vanish(
    hazard: tuple[dict[str, Path], dict[str, np.ndarray], np.ndarray],
) -> None:
    paths, feeds, want = hazard
    error = {m: relative_l2(Interpreter(paths["published"], mode=m).run(feeds)["y"], want)
             for m in Mode}  # fmt: skip
    assert error[Mode.EXACT] < 1e-5
    assert error[Mode.FP16] < 2e-3
    assert error[Mode.FTZ] > 0.9  # every 1/I is subnormal: the result is zero
    assert error[Mode.ACC16] > 1e-2  # sums of N·D positive terms stall


def test_half_precision_form_passes_every_mode(
    hazard: tuple[dict[str, Path], dict[str, np.ndarray], np.ndarray],
) -> None:
    paths, feeds, want = hazard
    for mode in Mode:
        got = Interpreter(paths[HALF_FORM], mode=mode).run(feeds)["y"]
        # Two roundings a stage; sums of at most 512 terms in acc16.
        assert relative_l2(got, want) < (1e-2 if mode is Mode.ACC16 else 2e-3), mode


def test_statistics_point_at_the_hazard(
    hazard: tuple[dict[str, Path], dict[str, np.ndarray], np.ndarray],
) -> None:
    paths, feeds, _ = hazard
    worst = {}
    for form, path in paths.items():
        stats = operator_stats(Interpreter(path).run_with_values(feeds))
        assert all(np.isfinite(s.peak) and s.rank <= 5 for s in stats)
        # Quotients carry the result; a lone product with ε may vanish without harm.
        worst[form] = max(s.subnormal_share for s in stats if s.op_type == "real_div")
    assert worst["published"] > 0.9
    assert worst[HALF_FORM] < 0.05


# The modes' arithmetic itself.


def test_sixteen_bit_sums_stall_and_chunks_are_added_in_half() -> None:
    ones = torch.ones(4096, 3)
    narrow, wide = Arithmetic(Mode.ACC16, half=True), Arithmetic(Mode.FP16, half=True)
    assert narrow.sum(ones, [0]).tolist() == [2048.0] * 3  # 2048 + 1 rounds to 2048
    assert wide.sum(ones, [0]).tolist() == [4096.0] * 3
    assert Arithmetic(Mode.ACC16, half=False).sum(ones, [0]).tolist() == [4096.0] * 3
    assert narrow.sum(ones, [0], keep=True).shape == (1, 3)
    assert narrow.mean(ones[:64], [0]).tolist() == [1.0] * 3
    assert narrow.cumsum(ones, 0)[-1].tolist() == [2048.0] * 3
    product = narrow.matmul(torch.full((2, 4096), 8.0), torch.full((4096, 2), 8.0))
    assert product.tolist() == [[float("inf")] * 2] * 2  # 262,144 is above 65,504
    assert float(narrow.matmul(ones.T[:1], ones[:, :1])) == 4096.0  # chunks of 32 are exact


def test_flushing_takes_subnormals_only() -> None:
    smallest = 2.0**-14
    values = torch.tensor([smallest, -smallest, smallest * 0.999, -(2.0**-24), 0.0, 70000.0])
    flushed = Arithmetic(Mode.FTZ, half=True).stored(values)
    assert flushed.tolist() == [smallest, -smallest, 0.0, 0.0, 0.0, float("inf")]
    assert Arithmetic(Mode.FP16, half=True).stored(values)[2] > 0
    assert Arithmetic(Mode.FTZ, half=True).stored(torch.tensor([float("nan")])).isnan().all()


def test_narrow_handlers_stay_near_the_wide_ones() -> None:
    """acc16 takes other code paths in these handlers; small sums barely differ."""
    from flowexport.targets.coreml.interpreter.handlers import HANDLERS

    narrow, wide = Arithmetic(Mode.ACC16, half=True), Arithmetic(Mode.EXACT, half=True)
    draw = torch.Generator().manual_seed(2)
    image = torch.randn(2, 8, 9, 7, generator=draw)
    number, flag = torch.tensor, torch.tensor(False)
    two = number([1, 1])
    convolution = {
        "x": image, "weight": torch.randn(6, 4, 3, 3, generator=draw), "bias": torch.ones(6),
        "strides": number([2, 1]), "pad_type": "custom", "pad": number([1, 0, 1, 1]),
        "dilations": two, "groups": number(2),
    }  # fmt: skip
    left, right = torch.randn(2, 3, 4, 5, generator=draw), torch.randn(2, 5, 4, 6, generator=draw)
    wide_row, weight = torch.randn(3, 70, generator=draw), torch.randn(4, 70, generator=draw)
    calls = {
        "conv": convolution,
        "linear": {"x": wide_row, "weight": weight, "bias": torch.ones(4)},
        "matmul": {"x": wide_row, "y": weight, "transpose_x": flag, "transpose_y": ~flag},
        "einsum": {"values": (left, right), "equation": "bchw,bwhu->bchu"},
        "softmax": {"x": image, "axis": number(1)},
        "layer_norm": {"x": image, "axes": number([1]), "epsilon": number(1e-5),
                       "gamma": torch.full((8,), 2.0), "beta": torch.ones(8)},
        "instance_norm": {"x": image, "epsilon": number(1e-5)},
        "reduce_log_sum_exp": {"x": image, "axes": number([1]), "keep_dims": flag},
    }  # fmt: skip
    for name, inputs in calls.items():
        want = HANDLERS[name](wide, **inputs).numpy()
        got = HANDLERS[name](narrow, **inputs).numpy()
        assert 0 < relative_l2(got, want) < 3e-3, name


# Whole shipped models.


def _named(name: str) -> tuple[nn.Module, list[TensorSpec], list[torch.Tensor]]:
    from flowexport_models import MODELS

    spec = MODELS[name]
    torch.manual_seed(0)
    module = spec.build().eval()
    inputs = [s.static() for s in spec.inputs]
    draw = torch.Generator().manual_seed(1)
    feeds = [torch.rand(tuple(s.shape), generator=draw) for s in inputs]
    for spec_, feed in zip(inputs, feeds, strict=True):
        if spec_.name == "padding_mask":
            feed.copy_(torch.arange(feed.shape[1]) < 20)
    return module, inputs, feeds


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["flowformer-vision-digits", "flowformer-timeseries-japanese-vowels"]
)
@pytest.mark.parametrize("form", ["published", HALF_FORM])
def test_named_model(name: str, form: str, tmp_path: Path) -> None:
    module, specs, feeds = _named(name)
    with torch.no_grad():
        want = module(*feeds).numpy()
    named = {s.name: f.numpy() for s, f in zip(specs, feeds, strict=True)}
    single = Interpreter(package(module, specs, form, Precision.FP32, tmp_path))
    assert relative_l2(single.run(named)["y"], want) <= 1e-6
    path = package(module, specs, form, Precision.FP16, tmp_path)
    for mode in Mode:
        got = Interpreter(path, mode=mode).run(named)["y"]
        assert 1e-5 < relative_l2(got, want) < 1e-2, mode


@pytest.mark.slow
def test_vision_224_is_exact_and_takes_seconds(tmp_path: Path) -> None:
    module, specs, feeds = _named("flowformer-vision-224")
    with torch.no_grad():
        want = module(*feeds).numpy()
    path = package(module, specs, "published", Precision.FP32, tmp_path)
    start = time.process_time()
    got = Interpreter(path).run({"image": feeds[0].numpy()})["y"]
    seconds = time.process_time() - start
    assert relative_l2(got, want) <= 1e-6
    # CPU seconds, because this machine may be busy: 10 s on two cores.
    assert seconds <= 20
