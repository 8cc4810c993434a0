"""Length buckets: each held to the reference at its own length, and beside the longest one.

A sequence goes to a bucket that holds it and is padded to its length. What
padding means is the model's own affair: one that masks it everywhere answers
the same in every bucket; the published time-series Flowformer lets its
attention see padded steps, so its answer may change with the bucket. That is
counted and told, and is no error of an artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import BundleError
from flowexport.core.findings import BucketResult
from flowexport.core.reports import EVALUATION_PREFIX
from flowexport.core.types import FORWARD, Dataset, TensorSpec
from flowexport.parity.cases import is_mask, make_cases
from flowexport.parity.reference import reference_outputs
from flowexport.parity.storage import (
    Evaluation,
    Golden,
    read_evaluation,
    read_golden,
    write_evaluation,
    write_golden,
)


@dataclass(frozen=True)
class Bucket:
    """What one more length of forward must give.

    Attributes:
        function: ``forward_<length>``.
        kept: which samples of the longest bucket's evaluation set it holds.
    """

    function: str
    length: int
    golden: Golden
    evaluation: Evaluation | None = None
    kept: np.ndarray | None = None

    @property
    def expected(self) -> tuple[tuple[str, str], ...]:
        """Return the (case, output) pairs to compare."""
        pairs = [
            (f"{self.function}/{case}", output)
            for case, outputs in self.golden.expected.items()
            for output in outputs
        ]
        if self.evaluation is not None:
            pairs.append((self.evaluation_case, self.evaluation.output))
        return tuple(pairs)

    @property
    def evaluation_case(self) -> str:
        assert self.evaluation is not None
        return f"{self.function}/{EVALUATION_PREFIX}{self.evaluation.dataset.name}"


def real_steps(dataset: Dataset) -> np.ndarray:
    """Return the real steps of each sample, (samples,), int64.

    They are the mask's ones, else the data set's lengths, else the whole
    second dimension: without either, padding is data.
    """
    for name, values in dataset.inputs.items():
        if is_mask(TensorSpec(name, values.shape)):
            return np.asarray((values != 0).sum(axis=1), dtype=np.int64)
    if dataset.lengths is not None:
        return dataset.lengths
    longest = max(v.shape[1] for v in dataset.inputs.values() if v.ndim > 1)
    return np.full(len(dataset), longest, dtype=np.int64)


def fit_lengths(dataset: Dataset, inputs: Sequence[TensorSpec]) -> tuple[Dataset, np.ndarray]:
    """Return the samples that static inputs hold, cut or zero-padded to them, and their indices.

    Args:
        inputs: specs of a bucket; a size behind the batch that differs from the
            data set's is the bucket's length.
    """
    lengths = [
        int(want)
        for s in inputs
        for want, have in zip(s.shape[1:], dataset.inputs[s.name].shape[1:], strict=True)
        if want != have
    ]
    kept = np.arange(len(dataset))
    if lengths:
        kept = np.flatnonzero(real_steps(dataset) <= min(lengths))
    fitted = replace(
        dataset,
        inputs={s.name: _resize(dataset.inputs[s.name][kept], s) for s in inputs},
        targets=dataset.targets[kept],
        lengths=None if dataset.lengths is None else dataset.lengths[kept],
    )
    return fitted, kept


def write_buckets(
    root: Path,
    module: Any,
    buckets: Mapping[int, Sequence[TensorSpec]],
    output_names: Sequence[str],
    dataset: Dataset | None,
    *,
    subject: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compute and write golden cases and scores of all buckets but the longest.

    Args:
        root: the bundle; files go to ``forward_<length>`` in ``golden`` and in ``evaluation``.
        dataset: at the longest bucket's length, or None.
        subject: identity of the model, the recipe's sha256.
    """
    for length in sorted(buckets)[:-1]:
        inputs, name = buckets[length], f"{FORWARD}_{length}"
        fitted = None if dataset is None else fit_lengths(dataset, inputs)[0]
        fitted = fitted if fitted is not None and len(fitted) else None
        cases = make_cases(inputs, fitted, seed=seed)
        expected = reference_outputs(module, cases, output_names, progress=progress)
        write_golden(root / "golden" / name, cases, expected, subject=subject)
        if fitted is None:
            continue
        feeds = {s.name: fitted.inputs[s.name] for s in inputs}
        scores = reference_outputs(module, {"all": feeds}, output_names)["all"]
        output = "logits" if "logits" in output_names else output_names[0]
        write_evaluation(
            root / "evaluation" / name, fitted, output, scores[output], subject=subject
        )


def read_buckets(
    root: Path, lengths: Sequence[int], longest: Evaluation | None, *, subject: str
) -> tuple[Bucket, ...]:
    """Read what :func:`write_buckets` wrote.

    Args:
        lengths: of all buckets.
        longest: evaluation set of the longest.

    Raises:
        BundleError: a file is missing, damaged or of another model.
    """
    found = []
    for length in sorted(lengths)[:-1]:
        name = f"{FORWARD}_{length}"
        golden = read_golden(root / "golden" / name, subject=subject)
        folder = root / "evaluation" / name
        evaluation = read_evaluation(folder, subject=subject) if folder.is_dir() else None
        kept = None
        if evaluation is not None and longest is not None:
            specs = [TensorSpec(n, v.shape) for n, v in evaluation.dataset.inputs.items()]
            kept = fit_lengths(longest.dataset, specs)[1]
            if len(kept) != len(evaluation.dataset):
                raise BundleError(
                    f"read evaluation {folder}: has {len(evaluation.dataset)} samples; expected"
                    f" the {len(kept)} of at most {length} steps.",
                    fix="convert again; a bundle is not edited by hand",
                )
        found.append(Bucket(name, length, golden, evaluation, kept))
    return tuple(found)


def bucket_result(bucket: Bucket, scores: np.ndarray, longest: Evaluation) -> BucketResult:
    """Count a bucket's predictions against the labels and against the longest bucket's.

    Args:
        scores: the artifact's, (samples, classes), finite.
        longest: evaluation set and reference of the longest bucket.
    """
    assert bucket.evaluation is not None and bucket.kept is not None
    ours = scores.argmax(axis=1)
    here = bucket.evaluation.reference_logits.argmax(axis=1)
    there = longest.reference_logits[bucket.kept].argmax(axis=1)
    targets = bucket.evaluation.dataset.targets
    return BucketResult(
        function=bucket.function,
        length=bucket.length,
        samples=len(ours),
        correct=int((ours == targets).sum()),
        agreement=int((ours == here).sum()),
        longest_correct=int((there == targets).sum()),
        longest_agreement=int((ours == there).sum()),
    )


def _resize(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    sizes = tuple(map(int, spec.shape[1:]))
    cut = values[(slice(None), *(slice(n) for n in sizes))]
    pads = [(0, 0), *((0, n - have) for n, have in zip(sizes, cut.shape[1:], strict=True))]
    return np.ascontiguousarray(np.pad(cut, pads))
