"""The causal recurrence: L steps equal one forward, state of fixed size, bad states told."""

from __future__ import annotations

import pytest
import torch
from attention_golden import golden_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention import VARIANTS, FlowVariant, flow_attention_reference
from flowexport.ops.flow_attention.streaming import FlowState, initial_state, step

CAUSAL = {
    **{n: v for n, v in VARIANTS.items() if v.causal},
    "wide": FlowVariant(clamp=(-40.0, 40.0), causal=True),
    "outer": FlowVariant(causal=True, outer_eps=1e-6),
}


def stream(
    q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant, dtype: torch.dtype | None = None
) -> Tensor:
    sizes = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    state = initial_state(variant, *sizes, dtype or q.dtype)
    results = []
    for t in range(q.shape[1]):
        result, state = step(q[:, t], k[:, t], v[:, t], state, variant)
        results.append(result)
    seen = q.shape[1] if state.t.dtype is not torch.float16 else min(q.shape[1], 2048)
    assert state.t.item() == seen, "half cannot count further"
    return torch.stack(results, 1)


@pytest.mark.parametrize("name", CAUSAL)
@given(
    st.integers(0, 3),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([(0.0, 0.0), (1.0, 0.0), (8.0, 0.0), (300.0, 0.0), (1.0, -12.0), (1.0, 30.0)]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_steps_equal_forward(
    name: str,
    batch: int,
    length: int,
    heads: int,
    width: int,
    value_width: int,
    logits: tuple[float, float],
) -> None:
    g = torch.Generator().manual_seed(length)
    scale, shift = logits
    shapes = [(batch, length, heads, w) for w in (width, width, value_width)]
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    q, k = q * scale + shift, k * scale + shift
    truth = flow_attention_reference(q, k, v, CAUSAL[name])
    result = stream(q, k, v, CAUSAL[name])
    assert result.shape == truth.shape
    if truth.numel():
        assert ((result - truth).abs().max() / truth.abs().max()).item() <= 1e-12


@pytest.mark.parametrize(
    "case", ["flow_attention_causal", "flow_attention_nlp", "flow_attention_rl"]
)
def test_steps_reproduce_the_golden_vectors(case: str) -> None:
    assert golden_error(case, stream, torch.float64) <= 1e-12
    assert golden_error(case, stream, torch.float32) <= 2e-6


def test_float32_does_not_drift_over_4096_steps() -> None:
    variant = VARIANTS["causal"]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 1, 8, generator=g, dtype=torch.float64) for _ in range(3))
    truth = flow_attention_reference(q, k, v, variant)
    result = stream(q.float(), k.float(), v.float(), variant).double()
    late = ((result - truth)[:, -100:].abs().max() / truth.abs().max()).item()
    assert late <= 1e-5


@pytest.mark.parametrize("name", ["causal", "nlp", "rl"])
def test_half_tokens_with_a_float32_state_do_not_drift_over_4096_steps(name: str) -> None:
    """And the negative control: a half state does."""
    variant = VARIANTS[name]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 1, 8, generator=g).half() for _ in range(3))
    v = v + 0.25
    truth = flow_attention_reference(q.double(), k.double(), v.double(), variant)
    late = slice(-100, None)
    scale = truth[:, late].abs().max()
    result = stream(q, k, v, variant, torch.float32)
    assert result.dtype == torch.float16
    assert ((result.double() - truth)[:, late].abs().max() / scale).item() <= 2.0**-11
    half = stream(q, k, v, variant, torch.float16)
    assert ((half.double() - truth)[:, late].abs().max() / scale).item() > 1e-2


def test_state_has_the_promised_shapes_and_is_not_changed() -> None:
    variant = VARIANTS["rl"]
    state = initial_state(variant, 2, 3, 4, 5)
    sizes = {name: tuple(t.shape) for name, t in state._asdict().items()}
    assert sizes == {
        "k_mean": (2, 3, 4),
        "q_mean": (2, 3, 4),
        "k_flow": (2, 3, 4),
        "q_flow": (2, 3, 4),
        "weight_mean": (2, 3, 1),
        "weight_max": (2, 3, 1),
        "context": (2, 3, 4, 5),
        "t": (1,),
    }
    before = FlowState(*(t.clone() for t in state))
    q = torch.randn(2, 3, 4)
    _, after = step(q, q, torch.randn(2, 3, 5), state, variant)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert {n: tuple(t.shape) for n, t in after._asdict().items()} == sizes


def test_another_models_state_is_told() -> None:
    variant = VARIANTS["causal"]
    q = torch.randn(1, 2, 4)
    with pytest.raises(InputError, match=r"state k_mean has shape \(1, 3, 4\); expected \(1, 2, 4"):
        step(q, q, q, initial_state(variant, 1, 3, 4, 4), variant)
    with pytest.raises(InputError, match=r"state context has shape .* expected \(1, 2, 4, 4\)"):
        step(q, q, q, initial_state(variant, 1, 2, 4, 5), variant)
    with pytest.raises(InputError, match=r"float16; expected one .* torch\.float32 or wider"):
        step(q, q, q, initial_state(variant, 1, 2, 4, 4, torch.float16), variant)
    mixed = initial_state(variant, 1, 2, 4, 4)._replace(q_mean=torch.zeros(1, 2, 4).double())
    with pytest.raises(InputError, match=r"state q_mean has dtype torch\.float64"):
        step(q, q, q, mixed, variant)


def test_a_non_causal_variant_cannot_stream() -> None:
    with pytest.raises(InputError, match="non-causal"):
        initial_state(VARIANTS["vision"], 1, 1, 2, 2)
    q = torch.randn(1, 1, 2)
    with pytest.raises(InputError, match="non-causal"):
        step(q, q, q, initial_state(VARIANTS["causal"], 1, 1, 2, 2), VARIANTS["vision"])


def test_a_whole_sequence_given_to_step_is_told() -> None:
    q = torch.randn(1, 7, 2, 4)
    with pytest.raises(InputError, match=r"expected \(B, H, D\)"):
        step(q, q, q, initial_state(VARIANTS["causal"], 1, 2, 4, 4), VARIANTS["causal"])
