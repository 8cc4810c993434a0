"""What a bundle is judged by: golden cases and the evaluation set, computed in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.pixels import round_feeds
from flowexport.core.types import Dataset, TensorSpec
from flowexport.plan import Plan
from flowexport.progress import Progress

PROBED = 32
"""Samples of the evaluation set that are held against calibrated ranges."""


def _cases(plan: Plan) -> dict[str, dict[str, Any]]:
    """Make the golden cases; a flexible dimension at its smallest, a middle and largest size."""
    from flowexport import parity

    subject, seed = plan.subject, plan.recipe.seed
    specs, dataset = subject.spec.inputs, subject.dataset
    flexible: dict[str, Any] = {}
    for options in plan.options.values():
        flexible |= options.extra.get("flexible") or {}
    if not flexible:
        return dict(parity.make_cases(specs, dataset, seed=seed))
    cases: dict[str, dict[str, Any]] = {}
    for name, limits in flexible.items():
        (kind, sizes), *_ = limits.items()
        middle = sum(sizes) // 2 if kind == "range" else sizes[len(sizes) // 2]
        for size in sorted({sizes[0], middle, sizes[-1]}):
            fixed = [
                replace(s, shape=tuple(size if d == name else d for d in s.shape)) for s in specs
            ]
            own = parity.make_cases(fixed, _of_shape(dataset, fixed), seed=seed)
            cases |= {f"{case}-{name}-{size}": feeds for case, feeds in own.items()}
    return cases


def _of_shape(dataset: Dataset | None, specs: Sequence[TensorSpec]) -> Dataset | None:
    """Return the set where its samples have these sizes."""
    if dataset is None:
        return None
    fits = all(dataset.inputs[s.name].shape[1:] == s.shape[1:] for s in specs)
    return dataset if fits else None


def probes(plan: Plan, root: Path) -> dict[str, dict[str, Mapping[str, np.ndarray]]]:
    """Return the saved cases that a calibrated file's ranges are held against.

    Returns:
        Function (the main one: empty) -> case, as verification names it -> input -> array. Of
        the evaluation set some samples, spread over its classes.
    """
    from flowexport import parity
    from flowexport.calibration import spread
    from flowexport.core.reports import EVALUATION_PREFIX

    subject = plan.subject
    key, dataset = subject.recipe_sha256, subject.dataset
    golden = parity.read_golden(root / "golden", subject=key)
    found = {"": dict(golden.cases)}
    if dataset is not None:
        some = spread(dataset.targets, PROBED)
        feeds = {s.name: dataset.inputs[s.name][some] for s in subject.spec.inputs}
        found[""][f"{EVALUATION_PREFIX}{dataset.name}"] = feeds
    lengths = None if subject.buckets is None else list(subject.buckets)
    for bucket in parity.read_buckets(root, lengths, None, subject=key) if lengths else ():
        cases = bucket.golden.cases.items()
        found[bucket.function] = {f"{bucket.function}/{case}": dict(f) for case, f in cases}
    return found


def write_references(plan: Plan, root: Path, progress: Progress) -> None:
    """Compute the golden outputs and the evaluation set's scores in float64, and save them."""
    from flowexport import parity

    subject, spec = plan.subject, plan.subject.spec
    progress.stage("reference")
    cases = _cases(plan)
    cases = {name: round_feeds(feeds, plan.pixels) for name, feeds in cases.items()}
    names = list(spec.output_names)
    expected = parity.reference_outputs(
        subject.module, cases, names, progress=lambda done, total: progress.step(done, total)
    )
    key = subject.recipe_sha256
    noise = parity.measure_noise(subject.module, cases, expected, names)
    parity.write_golden(root / "golden", cases, expected, subject=key, noise=noise)
    if subject.lengths is not None:
        progress.step(0, None, "a long stream")
        parity.write_stream(
            root / "golden",
            subject.module,
            spec.inputs[0],
            names[0],
            subject.dataset,
            subject=key,
            seed=plan.recipe.seed,
            progress=lambda done, total: progress.step(done, total),
        )
    if subject.buckets is not None:
        progress.step(0, None, "shorter lengths")
        parity.write_buckets(
            root,
            subject.module,
            subject.buckets,
            names,
            subject.dataset,
            subject=key,
            seed=plan.recipe.seed,
            progress=lambda done, total: progress.step(done, total),
        )
    if subject.dataset is None:
        return
    feeds = {s.name: subject.dataset.inputs[s.name] for s in spec.inputs}
    progress.step(0, None, subject.dataset.name)
    scores = parity.reference_outputs(subject.module, {"all": feeds}, names)["all"]
    output = "logits" if "logits" in names else names[0]
    noise = parity.measure_noise(subject.module, {"all": feeds}, {"all": scores}, names)
    parity.write_evaluation(
        root / "evaluation",
        subject.dataset,
        output,
        scores[output],
        subject=key,
        noise=noise["all"].get(output) if scores[output].ndim == 2 else None,
    )
