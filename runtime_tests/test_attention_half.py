"""The forms by means in torch half, whose kernels round every result to IEEE half."""

from __future__ import annotations

import pytest
import torch
from attention_golden import CASES, golden_error

from flowexport.ops.flow_attention import (
    VARIANTS,
    FlowVariant,
    flow_attention_reference,
    op_arguments,
)
from flowexport.ops.flow_attention.causal import causal_chunked
from flowexport.ops.flow_attention.causal_half import causal_means, running_mean
from flowexport.ops.flow_attention.half import as_dynamic, means
from flowexport.ops.flow_attention.lowered import published
from flowexport.ops.flow_attention.noncausal import channel_first, token_major

BOUND = 3e-3  # of the largest output; six ulps of half


def tensors(tokens: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 1, width, generator=g).half() for _ in range(3)]


@pytest.mark.parametrize("name", ["standard", "vision", "timeseries"])
@pytest.mark.parametrize("tokens", [16384, 16381, 65536])
def test_long_sequences_are_finite_and_accurate(name: str, tokens: int) -> None:
    q, k, v = tensors(tokens, 64)
    v = v + 0.25  # so that no true output is near zero by cancellation alone
    truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS[name])
    result = means(q, k, v, *op_arguments(VARIANTS[name]))
    assert result.dtype == torch.float16 and result.isfinite().all()
    assert ((result.double() - truth).abs().max() / truth.abs().max()).item() <= BOUND
    assert not ((result == 0) & (truth.half() != 0)).any()


def test_published_form_loses_them() -> None:
    """The negative control: what the means form is for."""
    q, k, v = tensors(16384, 64)
    result = flow_attention_reference(q, k, v, VARIANTS["standard"])
    assert not result.isfinite().all() or (result == 0).all()


@pytest.mark.parametrize("shift", [0.0, 4.0, -4.0])
@pytest.mark.parametrize(("tokens", "width"), [(3136, 8), (12544, 8), (1024, 64)])
def test_warm_and_cold_logits(tokens: int, width: int, shift: float) -> None:
    q, k, v = tensors(tokens, width, 1)
    q, k = q + shift, k + shift
    truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS["vision"])
    result = means(q, k, v, *op_arguments(VARIANTS["vision"])).double()
    assert ((result - truth).abs().max() / truth.abs().max()).item() <= BOUND


def test_one_token_that_takes_all_competition() -> None:
    """Without a clamp one token's c may reach N; it must not overflow."""
    tokens = 16384
    q, k, v = tensors(tokens, 64, 2)
    q, k = q * 0 + 4, k * 0 - 6
    k[:, 7] = 6
    truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS["timeseries"])
    result = means(q, k, v, *op_arguments(VARIANTS["timeseries"])).double()
    assert result.isfinite().all()
    # exp turns an absolute error of Ô (half's 2⁻¹⁰ · Ô) into a relative one.
    assert ((result - truth).abs().max() / truth.abs().max()).item() <= 5e-2


@pytest.mark.parametrize("name", ["lra", "mobile"])
def test_results_that_grow_with_the_length(name: str) -> None:
    q, k, v = (x.reshape(1, -1, 4, 64) for x in tensors(16384, 64, 3))
    truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS[name])
    result = means(q, k, v, *op_arguments(VARIANTS[name])).double()
    assert result.isfinite().all()
    assert ((result - truth).abs().max() / truth.abs().max()).item() <= 1e-2


CAUSAL = ("causal", "nlp", "rl")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "tokens",
    [1024, 4096, 16384, 16381, pytest.param(65536, marks=SLOW)],
)
def test_long_causal_sequences_are_finite_and_accurate(name: str, tokens: int) -> None:
    """Also of the later half's largest output, which is smaller than the first tokens'."""
    q, k, v = tensors(tokens, 64)
    v = v + 0.25
    arguments = op_arguments(VARIANTS[name])
    # The chunked form in double: the reference would hold N·D·M values.
    truth = causal_chunked(q.double(), k.double(), v.double(), *arguments)
    result = causal_means(q, k, v, *arguments)
    assert result.dtype == torch.float16 and result.isfinite().all()
    for start in (0, tokens // 2):
        error = (result.double() - truth).abs()[:, start:].max()
        assert (error / truth.abs()[:, start:].max()).item() <= BOUND
    assert not ((result == 0) & (truth.half() != 0)).any()


def test_chunked_form_loses_them() -> None:
    """The negative control: what the causal form by means is for."""
    q, k, v = tensors(8192, 64)
    arguments = op_arguments(VARIANTS["causal"])
    truth = causal_chunked(q.double(), k.double(), v.double(), *arguments)
    result = causal_chunked(q, k, v, *arguments)
    lost = ((result == 0) & (truth.half() != 0)).double().mean().item()
    assert lost > 0.25, "1/I is below half's smallest number"


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("shift", [4.0, -4.0])
def test_warm_and_cold_causal_logits(name: str, shift: float) -> None:
    q, k, v = tensors(3000, 16, 1)
    arguments = op_arguments(VARIANTS[name])
    truth = causal_chunked(*((q + shift).double(), (k + shift).double(), v.double()), *arguments)
    result = causal_means(q + shift, k + shift, v, *arguments).double()
    assert ((result - truth).abs().max() / truth.abs().max()).item() <= BOUND


def test_one_token_that_takes_all_causal_competition() -> None:
    """c_t reaches exp of the clamp's width (20 here), and the first tokens' e_t stay above 0."""
    tokens = 4096
    q, k, v = tensors(tokens, 64, 2)
    q, k = q * 0 + 4, k * 0 - 6
    k[:, 3000] = 6
    arguments = op_arguments(VARIANTS["rl"])
    truth = causal_chunked(q.double(), k.double(), v.double(), *arguments)
    result = causal_means(q, k, v, *arguments).double()
    assert result.isfinite().all()
    # exp turns an absolute error of Ô (half's 2⁻¹⁰ · 10) into a relative one.
    assert ((result - truth).abs().max() / truth.abs().max()).item() <= 2e-2


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 4097, 5000])
def test_running_mean(length: int) -> None:
    x = torch.randn(2, length, 3, dtype=torch.float64)
    truth = x.cumsum(1) / torch.arange(1, length + 1, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(running_mean(x), truth, rtol=0, atol=1e-14)
    half = running_mean(x.half()).double()
    assert ((half - truth).abs().max() / truth.abs().max()).item() <= BOUND


@pytest.mark.parametrize("name", ["standard", "vision", "timeseries"])
@pytest.mark.parametrize("tokens", [16384, 65536])
def test_one_stage_of_a_dynamic_length_is_enough_with_a_float32_accumulator(
    name: str, tokens: int
) -> None:
    q, k, v = tensors(tokens, 64)
    v = v + 0.25
    arguments = op_arguments(VARIANTS[name])
    truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS[name])
    with as_dynamic():
        result = means(q, k, v, *arguments)
    assert result.isfinite().all()
    assert ((result.double() - truth).abs().max() / truth.abs().max()).item() <= BOUND


def test_dynamic_length_computes_the_same() -> None:
    x = torch.randn(2, 70, 3, 5, dtype=torch.float64)
    for form, name in ((means, "vision"), (means, "lra"), (causal_means, "nlp")):
        arguments = op_arguments(VARIANTS[name])
        with as_dynamic():
            result = form(x, x.flip(1), x, *arguments)
        torch.testing.assert_close(result, form(x, x.flip(1), x, *arguments), rtol=0, atol=1e-12)


# (scale and shift of the logits, width): features near 30 and of thousands, rare and tiny ones,
# and tokens with no feature above 0 (one in 256 of width 8, one in 4 of width 2).
RELU = [(1, 30, 64), (10, 30, 64), (5000, 0, 64), (1, -2, 8), (0.01, 0, 8), (1, 0, 2), (1, -4, 64)]


@pytest.mark.parametrize(("scale", "shift", "width"), RELU)
def test_features_without_an_upper_end(scale: float, shift: float, width: int) -> None:
    q, k, v = (x.reshape(1, -1, 4, width) for x in tensors(4096, width, 3))
    q, k, v = q * scale + shift, k * scale + shift, v + 0.25
    arguments = op_arguments(VARIANTS["lra"])
    truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS["lra"])
    result = means(q, k, v, *arguments)
    assert result.dtype == torch.float16 and result.isfinite().all()
    assert ((result.double() - truth).abs().max() / truth.abs().max()).item() <= BOUND
    assert not ((result == 0) & (truth.abs() > 1e-3 * truth.abs().max())).any()


def test_other_forms_lose_features_near_30() -> None:
    """The negative control of the relu features' own scale."""
    q, k, v = (x.reshape(1, -1, 4, 64) for x in tensors(4096, 64, 3))
    for form in (published, channel_first, token_major):
        result = form(q + 30, k + 30, v, *op_arguments(VARIANTS["lra"]))
        usable = result.isfinite() & (result != 0)
        assert usable.double().mean() < 0.01


@pytest.mark.parametrize("competition", ["heads", "tokens"])
@pytest.mark.parametrize(("eps", "outer"), [(1e-6, 0.0), (1e-6, 1e-6), (0.3, 0.2), (0.0, 0.2)])
def test_scaled_features_keep_every_epsilon(competition: str, eps: float, outer: float) -> None:
    """Exact in float64 for any ε, and with tokens that have nothing else."""
    variant = FlowVariant("relu", None, eps, outer, competition_axis=competition)
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, 3, 4, generator=g, dtype=torch.float64) for n in (65, 130, 130))
    if eps:
        q[:, 3], k[:, 7], k[:, :, 1] = -1, -1, -1
    q, k = q * 7, k * 0.2
    truth = flow_attention_reference(q, k, v, variant)
    result = means(q, k, v, *op_arguments(variant))
    assert ((result - truth).abs().max() / truth.abs().max()).item() <= 1e-12


@pytest.mark.parametrize("case", CASES)
def test_authors_outputs_in_half(case: str) -> None:
    """Their layers with weights, inputs, projections and the form by means all in half."""

    def form(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: FlowVariant
    ) -> torch.Tensor:
        return (causal_means if variant.causal else means)(q, k, v, *op_arguments(variant))

    assert golden_error(case, form, torch.float16) <= BOUND


def test_causal_means_have_nothing_that_xnnpack_leaves_out() -> None:
    """A padding by another value than 0 (PADV2) or a selection tears the graph apart."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(1, 70, 2, 4)
    arguments = op_arguments(VARIANTS["causal"])
    graph = make_fx(lambda q, k, v: causal_means(q, k, v, *arguments))(x, x, x).graph
    assert not [n for n in graph.nodes if str(n.target).split(".")[-2:-1] in (["where"], ["gt"])]
    pads = [n for n in graph.nodes if "constant_pad" in str(n.target)]
    assert len(pads) == 3 and all(n.args[2:] in ((), (0.0,)) for n in pads)


def test_a_later_tokens_infinite_product_does_no_harm() -> None:
    q, k, v = tensors(128, 8)
    k[:, :60], k[:, 60:] = -11.25, 8  # features of 1.3e-5, then of 1: products up to 76,000
    arguments = op_arguments(VARIANTS["causal"])
    truth = causal_chunked(q.double(), k.double(), v.double(), *arguments)
    result = causal_means(q, k, v, *arguments)
    assert result.isfinite().all()
    late = (result.double() - truth).abs()[:, 60:].max() / truth.abs()[:, 60:].max()
    assert late.item() <= BOUND
