"""Named configurations and families; importing it loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flowexport_models.data import (
    DIGITS_LABELS,
    DIGITS_PREPROCESSING,
    JAPANESE_VOWELS_LABELS,
    JAPANESE_VOWELS_PREPROCESSING,
    JAPANESE_VOWELS_STREAM_PREPROCESSING,
)

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import ModelSpec, TensorSpec

WEIGHTS = Path(__file__).parent / "weights"
PAPER = (
    "Wu et al., Flowformer: Linearizing Transformers with Conservation Flows,"
    " ICML 2022 (arXiv 2202.06258)"
)

FAMILIES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "flowformer-vision": (
            "flowexport_models.flowformer_vision",
            "FlowformerVision",
            "FlowformerVisionConfig",
        ),
        "flowformer-timeseries": (
            "flowexport_models.flowformer_timeseries",
            "FlowformerTimeSeries",
            "FlowformerTimeSeriesConfig",
        ),
        "flowformer-causal-timeseries": (
            "flowexport_models.flowformer_causal_timeseries",
            "FlowformerCausalTimeSeries",
            "FlowformerCausalTimeSeriesConfig",
        ),
        "flowformer-gpt": (
            "flowexport_models.flowformer_gpt",
            "FlowformerGPT",
            "FlowformerGPTConfig",
        ),
    }
)
"""Family -> module, model class, configuration class."""


class EntryPoint:
    """A model's entry point, imported when it is called; ``ModelSpec.build``."""

    def __init__(self, module: str, function: str) -> None:
        self.module = module
        self.function = function

    def __call__(self, **config: Any) -> Any:
        return getattr(import_module(self.module), self.function)(**config)

    def __repr__(self) -> str:
        return f"{self.module}:{self.function}"


def build_spec(family: str, /, **config: Any) -> ModelSpec:
    """Describe a model of any size, as a recipe gives it.

    Args:
        family: one of :data:`FAMILIES`.
        config: the fields of the family's configuration class.

    Returns:
        A spec whose ``build`` returns the module and whose inputs fit the sizes.

    Raises:
        UnknownNameError: no such family or configuration key.
        InputError: a required key is missing, or a value does not fit.
    """
    if family not in FAMILIES:
        raise UnknownNameError("model family", str(family), FAMILIES)
    module_name, model_class, config_class = FAMILIES[family]
    module = import_module(module_name)
    known = fields(getattr(module, config_class))
    names = [f.name for f in known]
    for key in config:
        if key not in names:
            raise UnknownNameError("configuration key", str(key), names, where=f"build {family}")
    missing = [f.name for f in known if f.default is MISSING and f.name not in config]
    if missing:
        raise InputError(f"build {family}: the configuration lacks {', '.join(missing)}.")
    sizes = getattr(module, config_class)(**config)
    return ModelSpec(
        name=family,
        build=lambda: getattr(module, model_class)(sizes),
        inputs=sizes.inputs(),
        paper=PAPER,
        description=f"{family} of a recipe's own size",
    )


def build_model(family: str, /, **config: Any) -> Any:
    """Build a module of any size with fresh weights; arguments and errors as :func:`build_spec`."""
    return build_spec(family, **config).build()


_SPECS = (
    ModelSpec(
        name="flowformer-vision-224",
        build=EntryPoint("flowexport_models.flowformer_vision", "flowformer_vision_224"),
        inputs=(TensorSpec("image", ("batch", 3, 224, 224)),),
        preprocessing={
            "layout": "NCHW, RGB",
            "scale": 1 / 255,
            "range": [0.0, 1.0],
            "size": [224, 224],
            "resize": "bicubic, shorter side to 248, then centre crop to 224 (crop_pct 0.9)",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        paper=PAPER,
        description="ImageNet classifier, 43.3 M parameters; bring the authors' checkpoint",
    ),
    ModelSpec(
        name="flowformer-vision-digits",
        build=EntryPoint("flowexport_models.flowformer_vision", "flowformer_vision_digits"),
        inputs=(TensorSpec("image", ("batch", 1, 32, 32)),),
        labels=DIGITS_LABELS,
        preprocessing=dict(DIGITS_PREPROCESSING),
        weights=WEIGHTS / "flowformer-vision-digits.safetensors",
        dataset="digits-test",
        paper=PAPER,
        description="handwritten digits, 1x32x32, trained weights shipped",
    ),
    ModelSpec(
        name="flowformer-timeseries-japanese-vowels",
        build=EntryPoint(
            "flowexport_models.flowformer_timeseries", "flowformer_timeseries_japanese_vowels"
        ),
        inputs=(
            TensorSpec("x", ("batch", 29, 12)),
            TensorSpec("padding_mask", ("batch", 29)),
        ),
        labels=JAPANESE_VOWELS_LABELS,
        preprocessing=dict(JAPANESE_VOWELS_PREPROCESSING),
        weights=WEIGHTS / "flowformer-timeseries-japanese-vowels.safetensors",
        dataset="japanese-vowels-test",
        paper=PAPER,
        description="speaker of two Japanese vowels (UEA), 29x12, trained weights shipped",
    ),
    ModelSpec(
        name="flowformer-causal-timeseries-japanese-vowels",
        build=EntryPoint(
            "flowexport_models.flowformer_causal_timeseries",
            "flowformer_causal_timeseries_japanese_vowels",
        ),
        inputs=(TensorSpec("x", ("batch", 29, 12)),),
        labels=JAPANESE_VOWELS_LABELS,
        preprocessing=dict(JAPANESE_VOWELS_STREAM_PREPROCESSING),
        weights=WEIGHTS / "flowformer-causal-timeseries-japanese-vowels.safetensors",
        dataset="japanese-vowels-stream-test",
        paper=PAPER,
        description="speaker of two Japanese vowels after every frame, trained weights shipped",
        streaming=True,
    ),
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""Named configurations."""
