"""What an artifact is held to where a recipe says nothing, by precision."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

DEFAULT_TOLERANCES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fp32": {
            "max_rel": 1e-4,
            "min_cosine": 0.99999,
            "min_top1_agreement": 1.0,
            "reason": "default: fp32 rounding (6e-8) grown through some tens of layers, "
            "with another order of summation on each runtime",
        },
        "fp16": {
            "max_rel": 5e-2,
            "min_cosine": 0.999,
            "min_top1_agreement": 0.98,
            "reason": "default: fp16 rounding (5e-4) grown through some tens of layers; "
            "a top-1 may flip only where two logits are as close as that",
        },
        "int8-weights": {
            "max_rel": 0.1,
            "min_cosine": 0.995,
            "min_top1_agreement": 0.95,
            "reason": "default: 8 bits a weight, one scale a channel: about 0.8 % of noise a layer "
            "(half a step of 1/127, uniform, against weights of a quarter of their largest), "
            "grown through some tens of layers",
        },
        "int8-dynamic": {
            "max_rel": 0.15,
            "min_cosine": 0.99,
            "min_top1_agreement": 0.95,
            "reason": "default: int8 weights' noise, and as much again from activations rounded to "
            "8 bits with one range a tensor; 29 dB are 3.5 % of noise",
        },
        "int8-static": {
            "max_rel": 0.3,
            "min_cosine": 0.97,
            "min_top1_agreement": 0.9,
            "reason": "default: twice int8-dynamic's, for ranges fixed beforehand on calibration "
            "samples. A drawn case of which a layer's range clips more than that is measured and "
            "told, not judged",
        },
        "palette8": {
            "max_rel": 0.1,
            "min_cosine": 0.995,
            "min_top1_agreement": 0.95,
            "reason": "default: 256 values a tensor, placed by k-means: as int8 weights",
        },
        "palette6": {
            "max_rel": 0.2,
            "min_cosine": 0.99,
            "min_top1_agreement": 0.9,
            "reason": "default: 64 values a tensor, placed by k-means: about 3 % of noise a layer",
        },
        "palette4": {
            "max_rel": 0.6,
            "min_cosine": 0.9,
            "min_top1_agreement": 0.7,
            "reason": "default: 16 values a tensor, placed by k-means: about 10 % of noise a "
            "layer; the accuracy decides whether that will do",
        },
    }
)
