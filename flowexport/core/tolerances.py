"""What an artifact may differ from its reference, and which cases it is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flowexport.core.errors import RecipeError, UnknownNameError

REAL_SAMPLE, REAL_SET = "sample-", "evaluation"
"""What the names of cases begin with whose inputs are real samples."""


@dataclass(frozen=True)
class Tolerance:
    """What an artifact may differ from the float64 reference, and why.

    Attributes:
        max_rel: largest ``max|a - r| / max|r|`` of any case and output.
        reason: why these limits are right for this model and precision.
        min_cosine: smallest cosine similarity of any case and output.
        min_sqnr_db: smallest signal to quantisation-noise ratio, in dB.
        min_top1_agreement: share (0..1) of all rows whose arg max is the reference's.
        max_accuracy_drop: points (0..100) of accuracy that may be lost on the evaluation set.
        min_prediction_agreement: share (0..1) of evaluation samples predicted as the reference.
    """

    max_rel: float
    reason: str
    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    min_top1_agreement: float | None = None
    max_accuracy_drop: float | None = None
    min_prediction_agreement: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise RecipeError("tolerance: reason is empty; expected why these limits are right.")
        bounds = {
            "max_rel": (0.0, 1.0),
            "min_cosine": (-1.0, 1.0),
            "min_sqnr_db": (-math.inf, math.inf),
            "min_top1_agreement": (0.0, 1.0),
            "max_accuracy_drop": (0.0, 100.0),
            "min_prediction_agreement": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name != "max_rel":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not low <= value <= high:
                raise RecipeError(
                    f"tolerance: {name} has {value!r}; expected a number in [{low:g}, {high:g}]."
                )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tolerance:
        """Read a recipe's tolerance; raises RecipeError, or UnknownNameError for a key."""
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise UnknownNameError("tolerance key", str(key), known)
        for key in ("max_rel", "reason"):
            if key not in data:
                raise RecipeError(f"tolerance: {key} is missing; expected max_rel and reason.")
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_real(case: str) -> bool:
    """Whether a case's inputs are samples of a data set, not drawn."""
    return any(p == REAL_SET or p.startswith(REAL_SAMPLE) for p in case.split("/"))


def clips(clipped: float | None, tolerance: Tolerance) -> bool:
    """Whether calibrated ranges clip more of a layer's values than is allowed of the outputs."""
    return clipped is not None and not clipped <= tolerance.max_rel


def outside(case: str, clipped: float | None, tolerance: Tolerance) -> bool:
    """Whether a drawn case is so far outside the calibrated ranges that it is not judged.

    A statically quantised file clips there by its nature. Where that alone takes more of a
    layer's values than the tolerance allows of the outputs, it says nothing of the file.

    Args:
        clipped: as of :class:`~flowexport.core.findings.CaseResult`.
    """
    return not is_real(case) and clips(clipped, tolerance)
