"""The reference against outputs of the authors' own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_golden import CASES, golden_error

from flowexport.ops.flow_attention import flow_attention_reference

# The authors' own fp32 error is up to 4.3e-7 (index.json).
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_reference_reproduces_the_authors_outputs(case: str, dtype: torch.dtype) -> None:
    assert golden_error(case, flow_attention_reference, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("flow_attention_self", {"eps": 1e-5}),
        ("flow_attention_self", {"outer_eps": 1e-6}),
        ("flow_attention_cross", {"clamp": (-0.5, 0.5)}),
        ("flow_attention_rl", {"clamp": (-1.0, 1.0)}),
        ("flow_attention_lra", {"competition_axis": "tokens"}),
        ("flow_attention_lra", {"feature_map": "sigmoid"}),
        ("mobile_attention", {"flow_axis": "tokens"}),
    ],
)
def test_golden_vectors_tell_a_wrong_variant(case: str, change: dict[str, object]) -> None:
    error = golden_error(
        case,
        lambda q, k, v, variant: flow_attention_reference(q, k, v, replace(variant, **change)),
        torch.float64,
    )
    assert error > 1e-9
