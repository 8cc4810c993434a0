"""Ranges that a statically quantised file was calibrated on, and what they clip of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

PROBE = "probe"
"""What the names of tensors of cases to be verified begin with in a calibration file."""

FARTHEST = 1e9
"""What a quotient without a finite value is told as, for JSON has none."""

Span = tuple[float, float]
"""Smallest and largest value."""

NOTHING: Span = (np.inf, -np.inf)
"""The span of no value."""


def span(values: np.ndarray, so_far: Span = NOTHING) -> Span:
    """Return the span of values and of those seen before; NaN where a value is NaN."""
    return (
        float(np.minimum(so_far[0], values.min())),
        float(np.maximum(so_far[1], values.max())),
    )


class Clipping:
    """What a file's ranges clip of the values that its model computes in floating point.

    Args:
        held: name of a range -> what the finished file holds there.
    """

    def __init__(self, held: Mapping[str, Span]) -> None:
        self._held = held
        self._spans: dict[str, Span] = {}
        self._sums: dict[str, np.ndarray] = {}

    def look(self, name: str, values: np.ndarray) -> None:
        """Take values of one run into account.

        Args:
            name: of the range that they pass in the file.
        """
        wide = values.astype(np.float64)
        lost = wide - np.clip(wide, *self._held[name])
        self._spans[name] = span(wide, self._spans.get(name, NOTHING))
        sums = np.array([np.square(lost).sum(), np.square(wide).sum()])
        self._sums[name] = self._sums.get(name, 0.0) + sums

    def worst(self) -> dict[str, Any]:
        """Return where most is clipped.

        Returns:
            ``layer``: the range's name; ``clipped``: ``|x - clip(x)|_2 / |x|_2`` there, 0..1;
            ``stretch``: how many times wider the range had to be to hold all values. Empty
            where nothing was looked at.
        """
        shares = {n: _share(lost, whole) for n, (lost, whole) in self._sums.items()}
        if not shares:
            return {}
        layer = max(shares, key=lambda name: shares[name])
        stretch = _stretch(self._spans[layer], self._held[layer])
        return {"layer": layer, "clipped": shares[layer], "stretch": stretch}


def _share(lost: float, whole: float) -> float:
    share = float(np.sqrt(lost / whole)) if whole != 0 else 0.0
    return round(share, 6) if np.isfinite(share) else 1.0  # a value that is not finite is lost


def _stretch(needed: Span, held: Span) -> float:
    """Of values in [-3, 9] and a range [0, 6]: 2."""
    width = max(needed[1], held[1]) - min(needed[0], held[0])
    factor = width / (held[1] - held[0]) if held[1] > held[0] else np.inf
    return round(float(factor), 4) if factor <= FARTHEST else FARTHEST
