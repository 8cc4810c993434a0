"""What every registered model must do: build, lower in each precision, have its data."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from flowexport.core.types import ModelSpec, Precision
from flowexport.lowering import lower
from flowexport.ops.installed import installed_ops
from flowexport.registry import DATASETS, MODELS


@pytest.fixture(scope="module", params=MODELS.names())
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return MODELS.get(request.param)


@pytest.fixture(scope="module")
def module(spec: ModelSpec) -> torch.nn.Module:
    torch.manual_seed(0)
    built: torch.nn.Module = spec.build()
    return built.eval()


def test_description_is_complete(spec: ModelSpec) -> None:
    assert spec.description and spec.paper
    assert all(s.shape[0] == "batch" for s in spec.inputs)
    if spec.weights is not None:
        assert spec.weights.is_file() and spec.weights.stat().st_size < 3_000_000
        assert spec.weights.with_suffix(".md").is_file(), "a trained model has a card"


@pytest.mark.parametrize("precision", list(Precision))
def test_lowers_with_every_attention_kept(
    spec: ModelSpec, module: torch.nn.Module, precision: Precision
) -> None:
    program = lower(
        copy.deepcopy(module),
        spec.inputs,
        spec.output_names,
        name=spec.name,
        ops=installed_ops(),
        precision=precision,
    )
    assert program.attentions, "a Flowformer has attention nodes"
    assert all(site.module_path for site in program.attentions)
    assert {s.dtype for s in program.outputs} == {"float32"}


def test_data_set_fits_the_inputs(spec: ModelSpec) -> None:
    if spec.dataset is None:
        assert spec.weights is None, "trained weights need data to judge them by"
        return
    data = DATASETS.get(spec.dataset)()
    assert len(data) > 100
    assert data.labels == spec.labels and data.attribution
    assert set(np.unique(data.targets)) == set(range(len(spec.labels)))
    for tensor in spec.inputs:
        values = data.inputs[tensor.name]
        assert len(values) == len(data)
        tensor.check(values, f"dataset {spec.dataset}")
