"""PyTorch's own float32 error on each case: what a float32 artifact may be a few times of.

A tolerance holds for every model that a recipe may be given and for every
runtime. A damaged layer of a trained model often stays within it: a residual
hides it. The error of the same module in float32, case by case, is the scale
of what rounding does to *this* model on *this* input, and damage stands out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowexport.core.types import Precision
from flowexport.parity.metrics import compare

FACTOR = 16.0
"""Runtimes sum in another order and approximate exp in another way (measured over the shipped
models: ONNX Runtime 2, Core ML's interpreter 2, LiteRT 6 times PyTorch's error at most)."""
FLOOR = 2.0**-22
"""Two units in the last place of the largest value: a lucky case counts as no better."""

Noise = dict[str, dict[str, float]]
"""Case name -> output name -> ``max_rel`` of the torch module in float32."""


def measure_noise(
    module: Any,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    expected: Mapping[str, Mapping[str, np.ndarray]],
    output_names: Sequence[str],
) -> Noise:
    """Run a float32 torch module in eval mode and return its error against float64.

    Args:
        cases, expected: as in :class:`flowexport.parity.Golden`.
    """
    import torch

    noise: Noise = {}
    with torch.no_grad():
        for case, feeds in cases.items():
            results = module(*(torch.from_numpy(np.array(v)) for v in feeds.values()))
            if isinstance(results, torch.Tensor):
                results = (results,)
            elif isinstance(results, Mapping):
                results = tuple(results.values())
            noise[case] = {}
            for name, value in zip(output_names, results, strict=True):
                found = compare(case, name, value.float().numpy(), expected[case][name])
                if found.max_rel is not None:
                    noise[case][name] = found.max_rel
    return noise


def limit(measured: float | None, precision: Precision) -> float | None:
    """Return the ``max_rel`` that an artifact may have where PyTorch has ``measured``, or None."""
    if measured is None or precision is not Precision.FP32:
        return None
    return FACTOR * max(measured, FLOOR)
