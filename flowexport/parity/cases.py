"""Inputs to verify on: random, edge and real samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.tolerances import REAL_SAMPLE
from flowexport.core.types import Dataset, TensorSpec

RANDOM_CASES = 3
REAL_CASES = 3
BATCH = 3
LARGE = 10.0
"""Standard deviation of the ``large`` case; activations of sound fp16 models still fit."""

Feeds = dict[str, np.ndarray]


def make_cases(
    inputs: Sequence[TensorSpec], dataset: Dataset | None, *, seed: int = 0
) -> dict[str, Feeds]:
    """Make the cases that an artifact is verified on.

    ``random-0..2``, ``zeros``, ``large``, ``one-step`` (where an input is a
    mask: all but the first step is padding), ``sample-<index>`` (real samples,
    spread over the set and over its classes) and ``batch-3`` (where every
    input's batch is dynamic).

    An input is a mask where its name ends with ``mask``: float, integer or
    bool of shape (batch, steps), 1 = real step, at least one real step and
    padding behind. Other integer inputs stay in the range that the data set
    shows, else in {0, 1}. Dynamic dimensions other than the batch are 1.

    Returns:
        Case name -> input name -> array, of the specs' dtypes and order.

    Raises:
        InputError: there is no input, or the data set does not fit the specs.
    """
    if not inputs:
        raise InputError("verify cases: there is no input; expected at least one.")
    if dataset is not None:
        _check(inputs, dataset)
    rng = np.random.default_rng(seed)
    cases: dict[str, Feeds] = {}
    for i in range(RANDOM_CASES):
        lengths = "full" if i == 0 else "random"
        cases[f"random-{i}"] = {s.name: _draw(s, rng, 1.0, lengths, dataset) for s in inputs}
    cases["zeros"] = {s.name: _draw(s, rng, 0.0, "full", dataset) for s in inputs}
    cases["large"] = {s.name: _draw(s, rng, LARGE, "full", dataset) for s in inputs}
    if any(is_mask(s) for s in inputs):
        cases["one-step"] = {s.name: _draw(s, rng, 1.0, "one", dataset) for s in inputs}
    if dataset is not None:
        for i in _spread(dataset.targets, REAL_CASES):
            cases[f"{REAL_SAMPLE}{i}"] = {s.name: dataset.inputs[s.name][i : i + 1] for s in inputs}
    if all(s.shape and isinstance(s.shape[0], str) for s in inputs):
        cases[f"batch-{BATCH}"] = {
            s.name: _draw(s, rng, 1.0, "random", dataset, batch=BATCH) for s in inputs
        }
    return {
        case: {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        for case, feeds in cases.items()
    }


def is_mask(spec: TensorSpec) -> bool:
    """Whether an input marks real steps: name ends with ``mask``, (batch, steps)."""
    return spec.name.endswith("mask") and len(spec.shape) == 2


def _draw(
    spec: TensorSpec,
    rng: np.random.Generator,
    scale: float,
    lengths: str,
    dataset: Dataset | None,
    batch: int = 1,
) -> np.ndarray:
    first = {d: batch for d in spec.shape[:1] if isinstance(d, str)}
    shape = tuple(int(d) for d in spec.static(**first).shape)
    dtype = np.dtype(spec.dtype)
    if is_mask(spec):
        real = {
            "full": np.full(shape[0], shape[1]),
            "one": np.ones(shape[0]),
            "random": rng.integers(1, shape[1] + 1, shape[0]),
        }[lengths]
        return (np.arange(shape[1]) < real[:, None]).astype(dtype)
    if dtype.kind in "iub":
        low, high = 0, 1
        if dataset is not None:
            low, high = int(dataset.inputs[spec.name].min()), int(dataset.inputs[spec.name].max())
        drawn = rng.integers(low, high + 1, shape)
        return (np.full(shape, low) if scale == 0 else drawn).astype(dtype)
    return (scale * rng.standard_normal(shape)).astype(dtype)


def _spread(targets: np.ndarray, count: int) -> list[int]:
    """Return indices of up to ``count`` samples, of different classes where there are."""
    ranks = np.zeros(len(targets), dtype=np.int64)
    for value in np.unique(targets):
        members = np.flatnonzero(targets == value)
        ranks[members] = np.arange(len(members))
    # Round by round over the classes, then evenly over what that order offers first.
    order = np.lexsort((targets, ranks))
    first_round = order[: max(count, int(np.count_nonzero(ranks == 0)))]
    picks = np.linspace(0, len(first_round) - 1, min(count, len(first_round))).round()
    return sorted({int(first_round[int(p)]) for p in picks})


def _check(inputs: Sequence[TensorSpec], dataset: Dataset) -> None:
    where = f"verify cases {dataset.name}"
    if len(dataset) == 0:
        raise InputError(f"{where}: the data set has 0 samples; expected at least one.")
    for spec in inputs:
        if spec.name not in dataset.inputs:
            raise InputError(
                f"{where}: input {spec.name} is missing; expected {sorted(dataset.inputs)}."
            )
        values = dataset.inputs[spec.name]
        if len(values) != len(dataset):
            raise InputError(
                f"{where}: {spec.name} has {len(values)} samples; expected {len(dataset)}."
            )
        spec.check(values[:1], where)
