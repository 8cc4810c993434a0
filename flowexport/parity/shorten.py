"""Fewer samples and steps, for a machine that takes minutes for what takes a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flowexport.parity.buckets import Bucket
from flowexport.parity.storage import Evaluation
from flowexport.parity.streaming import SavedStream

STEPS = 128
"""Of a stream: past two chunks of the causal form."""


def shorten(
    evaluation: Evaluation | None,
    stream: SavedStream | None,
    buckets: Sequence[Bucket],
    samples: int,
) -> tuple[Evaluation | None, SavedStream | None, tuple[Bucket, ...]]:
    """Return the first samples of the evaluation set, the first steps of the stream.

    The set's name says how many samples are left; golden cases stay, and shorter
    lengths are held to them alone.
    """
    if evaluation is not None and samples < len(evaluation.dataset):
        dataset = evaluation.dataset
        steps = evaluation.reference_steps
        evaluation = replace(
            evaluation,
            dataset=replace(
                dataset,
                name=f"{dataset.name}-first-{samples}",
                inputs={n: v[:samples] for n, v in dataset.inputs.items()},
                targets=dataset.targets[:samples],
                lengths=None if dataset.lengths is None else dataset.lengths[:samples],
            ),
            reference_logits=evaluation.reference_logits[:samples],
            reference_steps=None if steps is None else steps[:samples],
        )
        buckets = [replace(b, evaluation=None, kept=None) for b in buckets]
    if stream is not None and stream.inputs.shape[1] > STEPS:
        stream = replace(
            stream,
            inputs=stream.inputs[:, :STEPS],
            forward=stream.forward[:, :STEPS],
            steps=stream.steps[:, :STEPS],
        )
    return evaluation, stream, tuple(buckets)
