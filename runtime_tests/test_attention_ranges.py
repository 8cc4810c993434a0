"""The range check tells apart what half precision keeps and what it loses."""

from __future__ import annotations

import pytest
import torch

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.ops.descriptor import AttentionSite
from flowexport.ops.flow_attention import VARIANTS, op_arguments
from flowexport.ops.flow_attention.ranges import (
    ARITHMETICS,
    LogitRange,
    RoundingMode,
    check_ranges,
    check_site,
)


def site(tokens: int, width: int, variant: str = "vision") -> AttentionSite:
    shape = ("batch", tokens, 2, width)
    return AttentionSite(
        "FlowAttention", "blocks.0", shape, shape, shape, op_arguments(VARIANTS[variant])
    )


def logits(tokens: int, width: int, shift: float = 0.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, width, generator=g) for _ in range(3))
    return [q + shift, k + shift, v]


# (tokens, width, shift of the logits, arithmetic).
LOSING = [
    (16384, 8, 30.0, "fp16"),
    (12544, 8, 0.0, "fp16_ftz"),
    (1024, 64, 2.0, "fp16_ftz"),
    (4096, 64, 0.0, "fp16"),
    (16384, 64, 0.0, "fp16"),
]


@pytest.mark.parametrize(("tokens", "width", "shift", "arithmetic"), LOSING)
def test_published_is_unsafe_where_means_is_safe(
    tokens: int, width: int, shift: float, arithmetic: str
) -> None:
    inputs = logits(tokens, width, shift)
    where = site(tokens, width)
    published = check_site(where, *inputs, "published", arithmetic)
    assert not published.safe and published.module_path == "blocks.0"
    assert published.lost > 0 or published.error > ARITHMETICS[arithmetic].bound
    chosen = check_site(where, *inputs, "means", arithmetic)
    assert chosen.safe, chosen.reason
    assert chosen.error <= ARITHMETICS[arithmetic].bound and chosen.overflow == ""


# (scale and shift of the logits, width, arithmetic, forms that lose them) of relu features.
RELU = [
    (10.0, 30.0, 64, "fp16", ("published", "channel_first", "token_major")),
    (100.0, 0.0, 64, "fp16_acc16", ("published", "channel_first", "token_major")),
    (1.0, -2.0, 8, "fp16_ftz", ("published", "channel_first", "token_major")),
]


@pytest.mark.parametrize(("scale", "shift", "width", "arithmetic", "losing"), RELU)
def test_relu_features_are_safe_in_their_own_scale_alone(
    scale: float, shift: float, width: int, arithmetic: str, losing: tuple[str, ...]
) -> None:
    q, k, v = logits(1024, width)
    inputs = (q * scale + shift, k * scale + shift, v)
    where = site(1024, width, "lra")
    for form in losing:
        assert not check_site(where, *inputs, form, arithmetic).safe
    chosen = check_site(where, *inputs, "means", arithmetic)
    assert chosen.safe, chosen.reason


def test_what_no_scale_saves_is_told() -> None:
    """Features so rare that their mean is a subnormal, sums in half of thousands, and an output
    that grows with the length beyond half's largest number."""
    where, (q, k, v) = site(1024, 64, "lra"), logits(1024, 64)
    assert check_site(where, q - 4, k - 4, v, "means", "fp16").safe
    assert not check_site(where, q - 4, k - 4, v, "means", "fp16_ftz").safe
    assert check_site(where, q * 5000, k * 5000, v, "means", "fp16").safe
    verdict = check_site(where, q * 5000, k * 5000, v, "means", "fp16_acc16")
    assert not verdict.safe and "mean" in verdict.overflow
    verdict = check_site(where, q, k, v * 2000, "means", "fp16")
    assert not verdict.safe and verdict.overflow


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_short_sequences_are_safe_in_either_form(arithmetic: str) -> None:
    for form in ("published", "means"):
        verdict = check_site(site(49, 8), *logits(49, 8), form, arithmetic)
        assert verdict.safe, verdict.reason


def test_an_overflow_names_the_operator() -> None:
    verdict = check_site(site(16384, 64), *logits(16384, 64, 8.0), "published", "fp16")
    assert not verdict.safe
    assert verdict.overflow and verdict.overflow in verdict.reason


def test_rounding_equals_torch_half() -> None:
    x = torch.randn(1000)
    with RoundingMode(ARITHMETICS["fp16"]):
        y = x * 3.1
    assert torch.equal(y, (x * torch.tensor(3.1).half().float()).half().float())


def test_flush_keeps_normal_and_drops_subnormal_numbers() -> None:
    x = torch.tensor([1e-5, 6.2e-5, 1.0, -3e-6])
    assert ARITHMETICS["fp16_ftz"].round(x).ne(0).tolist() == [False, True, True, False]
    assert ARITHMETICS["fp16"].round(x).ne(0).all()


def test_ranges_alone_find_the_saturated_case() -> None:
    ranges = {
        "q": LogitRange(0.0, 1.0, -4.0, 12.0),
        "k": LogitRange(0.0, 1.0, -4.0, 12.0),
        "v": LogitRange(0.0, 1.0, -4.0, 4.0),
    }
    assert not check_ranges(site(4096, 64), ranges, "published", "fp16").safe
    assert check_ranges(site(4096, 64), ranges, "means", "fp16").safe


def test_range_of_a_tensor() -> None:
    r = LogitRange.of(torch.tensor([1.0, 3.0]))
    assert (r.mean, r.std, r.low, r.high) == (2.0, 1.0, 1.0, 3.0)


def test_sums_in_half_are_safe_in_two_stages_and_not_in_one() -> None:
    """A dynamic length takes one stage, and the check runs that."""
    static = site(12544, 8)
    dynamic = AttentionSite(
        "FlowAttention", "a", *[("batch", "length", 2, 8)] * 3, op_arguments(VARIANTS["vision"])
    )
    inputs = logits(12544, 8)
    assert check_site(static, *inputs, "means", "fp16_acc16").safe
    assert not check_site(dynamic, *inputs, "means", "fp16_acc16").safe
    for arithmetic in ("fp16", "fp16_ftz", "bf16"):
        assert check_site(dynamic, *inputs, "means", arithmetic).safe
    assert not check_site(static, *inputs, "channel_first", "fp16_acc16").safe


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownNameError, match="unknown form"):
        check_site(site(4, 2), *logits(4, 2), "fast", "fp16")
    with pytest.raises(UnknownNameError, match="unknown arithmetic"):
        check_site(site(4, 2), *logits(4, 2), "means", "fp8")
    with pytest.raises(InputError, match="has a causal variant"):
        check_site(site(4, 2, "causal"), *logits(4, 2), "means", "fp16")
