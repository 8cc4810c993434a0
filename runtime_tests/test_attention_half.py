"""The means form in torch half, whose kernels round every result to IEEE half."""

from __future__ import annotations

import pytest
import torch

from flowexport.ops.flow_attention import VARIANTS, flow_attention_reference, op_arguments
from flowexport.ops.flow_attention.half import means

BOUND = 3e-3  # issue 3's goal, of the largest output


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
