"""Statistics of paired latency samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from flowexport.core.errors import InputError


@dataclass(frozen=True)
class Ratio:
    """A ratio of median latencies with its bootstrap interval."""

    median: float
    ci_low: float
    ci_high: float
    rounds: int
    confidence: float

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def ratio_of_medians(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Return ``median(a) / median(b)`` with a percentile bootstrap interval.

    Samples are paired: ``a[i]`` and ``b[i]`` come from the same interleaved
    round, and rounds are resampled whole, so that drift common to both cancels.

    Args:
        a, b: positive latencies of the same unit and number, at least two.

    Raises:
        InputError: the numbers of samples differ, or a sample is not positive.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise InputError(
            f"bench ratio: the samples have shapes {x.shape} and {y.shape}; "
            "expected equal numbers, at least 2."
        )
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise InputError("bench ratio: a sample is not positive and finite; expected ms above 0.")
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(0, len(x), len(x))
        ratios[i] = np.median(x[rows]) / np.median(y[rows])
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Ratio(
        float(np.median(x) / np.median(y)), float(low), float(high), len(x), float(confidence)
    )


def ratio_of_unpaired_medians(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Return ``median(a) / median(b)`` of two sessions with a percentile bootstrap interval.

    Each side is resampled by itself. What differs between the sessions (heat,
    other load) is in the ratio, not in the interval: :func:`ratio_of_medians`
    of interleaved rounds is the sharper tool where both can run together.

    Args:
        a, b: positive latencies of the same unit, at least two each.

    Raises:
        InputError: a side has too few samples, or one is not positive.
    """
    sides = [np.asarray(v, dtype=np.float64) for v in (a, b)]
    if any(v.ndim != 1 or len(v) < 2 for v in sides):
        raise InputError(
            f"bench ratio: the sides have {len(a)} and {len(b)} samples; expected at least 2 each."
        )
    if not all((np.isfinite(v) & (v > 0)).all() for v in sides):
        raise InputError("bench ratio: a sample is not positive and finite; expected ms above 0.")
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        x, y = (v[rng.integers(0, len(v), len(v))] for v in sides)
        ratios[i] = np.median(x) / np.median(y)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    middle = float(np.median(sides[0]) / np.median(sides[1]))
    rounds = min(len(v) for v in sides)
    return Ratio(middle, float(low), float(high), rounds, float(confidence))
