"""Metrics of one output against the float64 reference, all in one place.

All are computed in float64 on values divided by ``max|r|``, so that neither
squares nor sums overflow or vanish. Rules at the edges:

- a value that is not finite, another shape or another dtype, or an output
  without values: no metric, only a ``problem``; this never passes;
- an all-zero reference: ``max_rel`` and ``relative_l2`` are the absolute
  errors, SQNR is undefined, the cosine is 1 for an all-zero result, else
  undefined;
- an exact result: SQNR is infinite, stored as None with ``exact`` set.
"""

from __future__ import annotations

import math

import numpy as np

from flowexport.core.reports import CaseResult


def compare(
    case: str,
    output: str,
    actual: np.ndarray,
    reference: np.ndarray,
    *,
    dtype: str = "float32",
    class_scores: bool | None = None,
) -> CaseResult:
    """Measure an output against the reference.

    Args:
        actual: the artifact's output, of dtype name ``dtype``.
        reference: float64, of the same shape.
        class_scores: whether rows are scores of classes, for which top-1
            agreement is counted; None: for two dimensions with 2 classes or more.

    Returns:
        The metrics, or a result whose ``problem`` says why there are none.
    """

    def refuse(problem: str) -> CaseResult:
        return CaseResult(case, output, problem=problem)

    reference = np.asarray(reference, dtype=np.float64)
    if actual.shape != reference.shape:
        return refuse(f"has shape {list(actual.shape)}; expected {list(reference.shape)}")
    if actual.dtype.name != dtype:
        return refuse(f"has dtype {actual.dtype.name}; expected {dtype}")
    if reference.size == 0:
        return refuse("has no values; expected at least one to compare")
    if not np.isfinite(reference).all():
        return refuse("has a reference that is not finite; expected a usable golden case")
    bad = int(np.count_nonzero(~np.isfinite(actual)))
    if bad:
        return refuse(f"has {bad} of {actual.size} values that are not finite; expected none")
    if class_scores is None:
        class_scores = reference.ndim == 2 and reference.shape[1] > 1

    result = np.asarray(actual, dtype=np.float64)
    peak = float(np.abs(reference).max())
    error = np.abs(result - reference)
    max_abs = float(error.max())
    scale = peak if peak > 0 else 1.0
    relative_l2 = _norm(error / scale) / (_norm(reference / scale) if peak > 0 else 1.0)
    rows, matches = top1(result, reference) if class_scores else (0, 0)
    return CaseResult(
        case,
        output,
        max_abs=max_abs,
        max_rel=max_abs / scale,
        relative_l2=relative_l2,
        cosine=cosine(result, reference),
        sqnr_db=-20 * math.log10(relative_l2) if peak > 0 and relative_l2 > 0 else None,
        exact=max_abs == 0.0,
        rows=rows,
        top1_matches=matches,
        peak=peak,
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the cosine of the angle between two tensors read as vectors.

    1 where both are all zero, None where exactly one is.
    """
    peak_a, peak_b = float(np.abs(a).max()), float(np.abs(b).max())
    if peak_a == 0.0 or peak_b == 0.0:
        return 1.0 if peak_a == peak_b else None
    a, b = (a / peak_a).ravel(), (b / peak_b).ravel()
    return float(np.clip(np.dot(a, b) / (_norm(a) * _norm(b)), -1.0, 1.0))


def top1(result: np.ndarray, reference: np.ndarray) -> tuple[int, int]:
    """Return rows, and rows whose arg max has the reference's largest score.

    Classes that tie for the largest score in the reference are all right.
    """
    chosen = np.take_along_axis(reference, result.argmax(axis=1)[:, None], axis=1)[:, 0]
    return len(reference), int(np.count_nonzero(chosen == reference.max(axis=1)))


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(values))))
