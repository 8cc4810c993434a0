"""The fused kernel's host build, which executes the CUDA source's own blocks, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch

from flowexport.core.errors import InputError, UnavailableError
from flowexport.ops.flow_attention.reference import flow_attention_reference
from flowexport.ops.flow_attention.tensorrt.build import build_host
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary, Problem, problem
from flowexport.ops.flow_attention.tensorrt.shapes import causal_truth
from flowexport.ops.flow_attention.variant import VARIANTS, FlowVariant

# Of the largest output. float16 and bfloat16: half a unit in the last place of the result is
# 4.9e-4 and 3.9e-3 of an output just above a power of two; tensor cores round their operands to
# TF32, 4.9e-4 each, which averages out over tokens and columns; sums are float32.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}

# (B, L, S, H, D, M): every padded width, ragged tiles, widths that forbid 16-byte access, D != M.
SHAPES = [
    (2, 37, 37, 3, 8, 8),
    (1, 700, 531, 2, 16, 16),
    (2, 1, 1, 2, 12, 20),
    (1, 130, 200, 2, 33, 70),
    (1, 600, 1000, 2, 64, 64),
    (2, 300, 170, 2, 32, 20),
    (1, 300, 260, 1, 128, 128),
    (1, 5, 90, 2, 128, 1),
    (3, 64, 64, 1, 1, 128),
    (1, 1100, 513, 12, 8, 8),
]


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    try:
        return KernelLibrary(build_host())
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reverse() -> KernelLibrary:
    try:
        return KernelLibrary(build_host(reverse=True))
    except UnavailableError as error:
        pytest.skip(str(error))


def tensors(
    shape: tuple[int, ...], variant: FlowVariant, dtype: torch.dtype, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, sinks, sources, heads, width, value_width = shape
    if variant.causal or variant.flow_axis == "heads":
        sources = sinks
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    q = draw(b, sinks, heads, width) * scale
    k = draw(b, sources, heads, width) * scale
    return q.to(dtype), k.to(dtype), draw(b, sources, heads, value_width).to(dtype)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.isfinite(result).all()
    return float((result.double() - truth).abs().max() / truth.abs().max())


def truth_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: FlowVariant):
    return flow_attention_reference(q.double(), k.double(), v.double(), variant)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", VARIANTS)
def test_matches_float64(library, name, dtype):
    for shape in SHAPES:
        q, k, v = tensors(shape, VARIANTS[name], dtype)
        truth = truth_of(q, k, v, VARIANTS[name])
        for splits in (0, 1, 3):  # planned, one block a pair, several segments
            result = library(q, k, v, VARIANTS[name], splits=splits)
            assert error(result, truth) <= TOLERANCE[dtype], (shape, splits)


@pytest.mark.parametrize("name", VARIANTS)
def test_path_without_tensor_cores(library, name):
    """GPUs before 8.0. The two paths must differ where tensor cores are used, and only there."""
    plain = KernelLibrary(build_host(plain=True))
    for shape in ((1, 300, 260, 2, 32, 32), (1, 200, 150, 2, 64, 64), (1, 130, 200, 1, 128, 70)):
        for dtype in TOLERANCE:
            q, k, v = tensors(shape, VARIANTS[name], dtype)
            truth = truth_of(q, k, v, VARIANTS[name])
            for splits in (1, 3):
                result = plain(q, k, v, VARIANTS[name], splits=splits)
                assert error(result, truth) <= TOLERANCE[dtype]
                same = torch.equal(result, library(q, k, v, VARIANTS[name], splits=splits))
                # A causal sequence in one segment passes no context on: no tensor core takes part.
                alone = VARIANTS[name].causal and splits == 1
                assert same == (dtype == torch.float32 or alone), (shape, dtype, splits)
    q, k, v = tensors((1, 300, 260, 2, 16, 16), VARIANTS[name], torch.float16)
    assert torch.equal(plain(q, k, v, VARIANTS[name]), library(q, k, v, VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_phase_depends_on_the_order_of_threads(library, reverse, name):
    """Bitwise: a value read in the phase that writes it would differ between the two orders."""
    for shape in ((2, 37, 37, 3, 8, 8), (1, 300, 260, 1, 128, 70), (1, 700, 531, 2, 30, 16)):
        for dtype in (torch.float32, torch.float16):
            q, k, v = tensors(shape, VARIANTS[name], dtype)
            for splits in (0, 1, 4):
                a = library(q, k, v, VARIANTS[name], splits=splits)
                assert torch.equal(a, reverse(q, k, v, VARIANTS[name], splits=splits))
                assert torch.equal(a, library(q, k, v, VARIANTS[name], splits=splits))


@pytest.mark.parametrize("axis", ["flow", "competition", "both"])
@pytest.mark.parametrize("clamp", [(-1.0, 1.0), None])
@pytest.mark.parametrize("feature_map", ["sigmoid", "relu"])
def test_variants_nobody_published(library, axis, clamp, feature_map):
    variant = FlowVariant(
        feature_map,
        clamp,
        eps=1e-3,
        outer_eps=1e-2,
        flow_axis="heads" if axis != "competition" else "tokens",
        competition_axis="heads" if axis != "flow" else "tokens",
    )
    q, k, v = tensors((2, 150, 150, 5, 24, 40), variant, torch.float32)
    assert error(library(q, k, v, variant), truth_of(q, k, v, variant)) <= 1e-6


def test_causal_with_a_wide_clamp(library):
    variant = FlowVariant(clamp=(-40.0, 40.0), causal=True, outer_eps=1e-3)
    q, k, v = tensors((1, 900, 900, 2, 16, 16), variant, torch.float32)
    truth = truth_of(q, k, v, variant)
    assert error(library(q, k, v, variant, splits=3), truth) <= 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_large_and_zero_inputs(library, name):
    """Saturated φ makes Ô span hundreds: the online maximum and every ratio must hold."""
    for dtype in (torch.float32, torch.float16):
        for splits in (1, 3):
            q, k, v = tensors((1, 400, 400, 2, 16, 16), VARIANTS[name], dtype, scale=30.0)
            truth = truth_of(q, k, v, VARIANTS[name])
            # The reference itself, in float32, is off by this much where φ is near zero.
            own = error(
                flow_attention_reference(q.float(), k.float(), v.float(), VARIANTS[name]), truth
            )
            limit = max(TOLERANCE[dtype], 4 * own)
            assert error(library(q, k, v, VARIANTS[name], splits=splits), truth) <= limit
            zero = torch.zeros_like(q)
            truth = truth_of(zero, zero, v, VARIANTS[name])
            result = library(zero, zero, v, VARIANTS[name], splits=splits)
            assert error(result, truth) <= TOLERANCE[dtype]
            assert not library(q, k, torch.zeros_like(v), VARIANTS[name]).any()


def test_the_check_can_fail(library):
    """Negative control: another ε, clamp or axis exceeds the tolerance."""
    q, k, v = tensors((1, 200, 200, 2, 16, 16), VARIANTS["standard"], torch.float32)
    truth = truth_of(q, k, v, VARIANTS["standard"])
    for other in (
        FlowVariant(eps=1e-4),
        FlowVariant(clamp=(-1.0, 0.9)),
        FlowVariant(outer_eps=0.1),
        FlowVariant(flow_axis="heads"),
        FlowVariant(competition_axis="heads"),
        FlowVariant(feature_map="relu"),
        FlowVariant(causal=True),
    ):
        assert error(library(q, k, v, other), truth) > 1e-5, other


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_65536_tokens(library, name):
    variant = VARIANTS[name]
    for width in (8, 64):
        for dtype in (torch.float32, torch.float16):
            shape = (1, 65536, 65536, 2, width, width)
            q, k, v = tensors(shape, variant, dtype)
            truth = (causal_truth if variant.causal else truth_of)(q, k, v, variant)
            result = library(q, k, v, variant)
            assert error(result, truth) <= TOLERANCE[dtype]
            if variant.causal:  # early outputs are larger: judge the late ones by themselves
                assert error(result[:, 32768:], truth[:, 32768:]) <= TOLERANCE[dtype]


def test_chunked_truth_is_the_reference():
    q, k, v = tensors((1, 300, 300, 2, 8, 12), VARIANTS["rl"], torch.float32)
    truth = truth_of(q, k, v, VARIANTS["rl"])
    assert error(causal_truth(q, k, v, VARIANTS["rl"], chunk=64), truth) <= 1e-13


def launch(library: KernelLibrary, described: Problem, size: int, offset: int = 0) -> None:
    """Launch on guarded memory: what lies around the output and the workspace must survive."""
    guard = 512
    elements = described.batch * described.heads * described.sinks * described.value_width
    out = torch.full((elements + 2 * guard,), 7.0)
    memory = torch.full((size + 4 * guard,), 0xA5, dtype=torch.uint8)
    start = -(memory.data_ptr() + guard) % 256 + guard
    tokens = described.batch * described.heads * max(described.sinks, described.sources)
    x = torch.ones(tokens * max(described.width, described.value_width))
    pointers = [x.data_ptr()] * 3 + [out.data_ptr() + 4 * guard]
    library.launch_pointers(described, *pointers, memory.data_ptr() + start + offset, size)
    assert (out[:guard] == 7).all()
    assert (out[guard + elements :] == 7).all()
    assert (memory[:start] == 0xA5).all()
    assert (memory[start + size :] == 0xA5).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_workspace_of_the_maximum_serves_all_below(library, name):
    shape = (6, 700, 4, 48)

    def described(b: int, n: int, h: int, d: int) -> Problem:
        return problem((b, n, h, d), (b, n, h, d), (b, n, h, d), "float32", VARIANTS[name])

    size = library.workspace(described(*shape))
    for smaller in (shape, (1, 700, 1, 48), (6, 1, 4, 48), (1, 257, 4, 48), (2, 90, 3, 48)):
        launch(library, described(*smaller), size)
        assert library.workspace(described(*smaller)) <= size


def test_bad_input_is_refused(library):
    variant = VARIANTS["standard"]

    def described(width: int = 8, **changes: int | float) -> Problem:
        shape = (1, 10, 2, width)
        result = problem(shape, shape, shape, "float32", variant)
        for name, value in changes.items():
            setattr(result, name, value)
        return result

    for wrong, part in (
        (described(129), "1 to 128"),
        (described(batch=0), "at least 1"),
        (described(dtype=7), "dtype"),
        (described(feature_map=2), "feature_map"),
        (described(clamp_low=2.0), "clamp_low"),
        (described(eps=-1.0), "eps"),
        (described(eps=float("nan")), "eps"),
        (described(causal=1, sources=9), "as many"),
        (described(causal=1, flow_over_heads=1), "tokens only"),
        (described(batch=1 << 40), "2^31"),
        (described(splits=-1), "splits"),
    ):
        with pytest.raises(InputError, match=part.replace("^", r"\^")):
            library.workspace(wrong)
    size = library.workspace(described())
    launch(library, described(), size)
    with pytest.raises(InputError, match="workspace"):
        launch(library, described(), 16)
    with pytest.raises(InputError, match="workspace"):
        launch(library, described(), size, offset=4)
    with pytest.raises(InputError, match="null"):
        library.launch_pointers(described(), 0, 0, 0, 0, 0, size)
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(InputError, match="float64"):
        library(x.double(), x.double(), x.double(), variant)
    with pytest.raises(InputError, match="shapes"):
        problem((1, 4, 2, 8), (1, 4, 2, 9), (1, 4, 2, 8), "float32", variant)


def test_problem_has_the_layout_of_the_header():
    assert ctypes.sizeof(Problem) == 4 * 8 + 8 * 4 + 4 * 4 + 2 * 4


def test_a_file_that_is_no_kernel(tmp_path):
    path = tmp_path / "x.so"
    path.write_bytes(b"no library")
    with pytest.raises(UnavailableError, match="cannot be loaded"):
        KernelLibrary(path)


def test_compiler_failures_are_clear(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(UnavailableError, match="false returned 1"):
        build_host(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler"):
        build_host(tmp_path)
