"""What a comparison found, and the limits it is held to.

JSON never holds NaN or infinity; what has no finite value is null and the
entry's reason says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from flowexport.core.tolerances import Tolerance, clips, is_real, outside
from flowexport.core.types import Verdict

OUTSIDE = "OUTSIDE"
"""What a case is told as that was run but not judged; neither PASS nor FAIL."""


def finite(value: float | None) -> float | None:
    """Return ``value`` as a float, or None where it has no finite value."""
    return None if value is None or not math.isfinite(value) else float(value)


@dataclass(frozen=True)
class CaseResult:
    """One output of one case against the reference.

    Attributes:
        max_abs: ``max|a - r|``.
        max_rel: ``max|a - r| / max|r|``; ``max_abs`` itself where the reference is all zero.
        relative_l2: ``|a - r|_2 / |r|_2``; ``|a - r|_2`` itself where the reference is all zero.
        cosine: None where exactly one side is all zero (both zero: 1).
        sqnr_db: ``10 log10(|r|^2 / |a - r|^2)``; None where exact or the reference is all zero.
        exact: every value equals the reference's.
        rows: rows of class scores (0 where the output is none).
        top1_matches: rows whose arg max is the reference's, or ties with it in the reference.
        problem: why there is nothing to measure (shape, dtype, not finite), or None.
        peak: largest ``|r|``, so that ``max_abs`` can be read.
        limit: ``max_rel`` that a float32 file may have here, from PyTorch's own error, or
            None; see ``flowexport.parity.noise``.
        clipped: of a file with calibrated ranges, ``|x - clip(x)|_2 / |x|_2`` of the float
            model's values x at the layer that clips most, 0..1; None elsewhere.
        layer: which that is, ``<layer> input`` or ``output``.
        stretch: how many times wider its range had to be to hold the values.
    """

    case: str
    output: str
    max_abs: float | None = None
    max_rel: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None
    exact: bool = False
    rows: int = 0
    top1_matches: int = 0
    peak: float | None = None
    problem: str | None = None
    limit: float | None = None
    clipped: float | None = None
    layer: str | None = None
    stretch: float | None = None

    @property
    def real(self) -> bool:
        """Whether the inputs are samples of a data set, not drawn."""
        return is_real(self.case)

    def outside(self, tolerance: Tolerance) -> bool:
        """Whether this case is not judged, see :func:`~flowexport.core.tolerances.outside`."""
        return outside(self.case, self.clipped, tolerance)

    def _range(self) -> str:
        share = "a share" if self.clipped is None else f"{100 * self.clipped:.0f} %"
        return (
            f"{self.layer} clips {share} of the values, which need {_show(self.stretch)} times its"
            " calibrated range"
        )

    @property
    def top1_agreement(self) -> float | None:
        return self.top1_matches / self.rows if self.rows else None

    def violation(self, tolerance: Tolerance) -> str | None:
        """Return how this result leaves ``tolerance``, or None."""
        where = f"{self.case}: {self.output}"
        if self.problem is not None:
            return f"{where} {self.problem}"
        if self.outside(tolerance):
            return None
        if clips(self.clipped, tolerance):
            return (
                f"{self.case}: {self._range()}; expected at most {100 * tolerance.max_rel:g} % of"
                " real samples"
            )
        if self.max_rel is None or not self.max_rel <= tolerance.max_rel:
            return f"{where} has max_rel {_show(self.max_rel)}; expected <= {tolerance.max_rel:g}"
        if self.limit is not None and self.max_rel > self.limit:
            return (
                f"{where} has max_rel {_show(self.max_rel)}; expected <= {self.limit:.2g}, a"
                " multiple of PyTorch's own float32 error"
            )
        if self.exact or not self.peak:
            return None  # cosine and SQNR say nothing here
        limits = (
            ("cosine", self.cosine, tolerance.min_cosine),
            ("SQNR in dB", self.sqnr_db, tolerance.min_sqnr_db),
        )
        for name, value, low in limits:
            if low is not None and (value is None or not value >= low):
                return f"{where} has {name} {_show(value)}; expected >= {low:g}"
        return None

    def to_json(self, tolerance: Tolerance) -> dict[str, Any]:
        violation = self.violation(tolerance)
        data = asdict(self)
        for key in ("max_abs", "max_rel", "relative_l2", "cosine", "sqnr_db", "peak"):
            data[key] = finite(data[key])
        data["top1_agreement"] = self.top1_agreement
        data["verdict"] = (Verdict.FAIL if violation else Verdict.PASS).value
        data["reason"] = violation
        if violation is None and self.outside(tolerance):
            data["verdict"] = OUTSIDE
            data["reason"] = f"not judged: {self._range()}"
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaseResult:
        later = ("limit", "clipped", "layer", "stretch")
        values: dict[str, Any] = {
            f.name: data.get(f.name) if f.name in later else data[f.name] for f in fields(cls)
        }
        return cls(**values)


@dataclass(frozen=True)
class AccuracyResult:
    """Predictions on a labelled set, counted against the labels and the reference.

    Attributes:
        samples: samples predicted; ``expected_samples``: samples in the set.
        agreement: samples predicted as the reference predicts.
        lost, gained: samples that only the reference, or only the artifact, gets right.
    """

    dataset: str
    expected_samples: int
    samples: int
    correct: int
    reference_correct: int
    agreement: int
    lost: int
    gained: int

    @property
    def accuracy(self) -> float | None:
        """Share of correct samples, 0..1."""
        return self.correct / self.samples if self.samples else None

    @property
    def reference_accuracy(self) -> float | None:
        return self.reference_correct / self.samples if self.samples else None

    @property
    def drop_points(self) -> float | None:
        """Points (of 100) of accuracy lost against the reference; negative where gained."""
        if not self.samples:
            return None
        return 100.0 * (self.reference_correct - self.correct) / self.samples

    @property
    def p_value(self) -> float | None:
        """Exact McNemar test of equal accuracy, two-sided, on the same samples.

        Under equal accuracy each sample that only one side gets right is a fair
        coin: the binomial tails of ``lost`` among ``lost + gained`` (McNemar 1947).
        1.0 where both get the same samples right; None without samples.
        """
        if not self.samples:
            return None
        flips = self.lost + self.gained
        tail = sum(math.comb(flips, k) for k in range(min(self.lost, self.gained) + 1))
        return min(1.0, 2.0 * tail / 2.0**flips)

    def violation(self, tolerance: Tolerance) -> str | None:
        if self.samples == 0 or self.samples != self.expected_samples:
            return (
                f"{self.dataset}: {self.samples} samples were predicted; "
                f"expected {self.expected_samples}"
            )
        drop, limit = self.drop_points, tolerance.max_accuracy_drop
        if limit is not None and drop is not None and not drop <= limit:
            return (
                f"{self.dataset}: accuracy drops {drop:.2f} points; expected <= {limit:g}"
                f" ({self.lost} lost, {self.gained} gained, exact McNemar p = {self.p_value:.2g})"
            )
        low = tolerance.min_prediction_agreement
        if low is not None and not self.agreement / self.samples >= low:
            return (
                f"{self.dataset}: {self.agreement} of {self.samples} predictions are the "
                f"reference's; expected a share >= {low:g}"
            )
        return None

    def to_json(self, tolerance: Tolerance) -> dict[str, Any]:
        violation = self.violation(tolerance)
        return {
            **asdict(self),
            "accuracy": self.accuracy,
            "reference_accuracy": self.reference_accuracy,
            "drop_points": self.drop_points,
            "p_value": self.p_value,
            "verdict": (Verdict.FAIL if violation else Verdict.PASS).value,
            "reason": violation,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AccuracyResult:
        return cls(**{f.name: data[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class StreamResult:
    """A causal artifact run step by step.

    Attributes:
        steps: of the longest stream that was run.
        state_bytes: of the state for one stream.
        drift: (steps so far, largest error of the last 64 steps relative to the
            largest reference value), against the float64 reference's own steps.
        dataset, samples: of the labelled set, or None and 0.
        correct_after_step: right answers after 1, 2, ... steps; a sample that has
            ended keeps its last answer. ``reference_after_step``: the reference's.
    """

    steps: int
    state_bytes: int
    drift: tuple[tuple[int, float], ...]
    dataset: str | None = None
    samples: int = 0
    correct_after_step: tuple[int, ...] = ()
    reference_after_step: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "drift": [list(pair) for pair in self.drift],
            "correct_after_step": list(self.correct_after_step),
            "reference_after_step": list(self.reference_after_step),
            "accuracy_after_step": [n / self.samples for n in self.correct_after_step],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamResult:
        return cls(
            steps=data["steps"],
            state_bytes=data["state_bytes"],
            drift=tuple((int(n), float(e)) for n, e in data["drift"]),
            dataset=data["dataset"],
            samples=data["samples"],
            correct_after_step=tuple(data["correct_after_step"]),
            reference_after_step=tuple(data["reference_after_step"]),
        )


@dataclass(frozen=True)
class BucketResult:
    """Predictions of one more length of forward, on the samples that it holds.

    Attributes:
        agreement: samples predicted as the float64 reference predicts at this length.
        longest_correct: samples that the reference gets right at the longest bucket's
            length, padded to that.
        longest_agreement: samples predicted as it predicts there: a fact on the model,
            whose answer may depend on the padding.
    """

    function: str
    length: int
    samples: int
    correct: int
    agreement: int
    longest_correct: int
    longest_agreement: int

    def violation(self, tolerance: Tolerance) -> str | None:
        low = tolerance.min_prediction_agreement
        if low is not None and not self.agreement / self.samples >= low:
            return (
                f"{self.function}: {self.agreement} of {self.samples} predictions are the"
                f" reference's; expected a share >= {low:g}"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BucketResult:
        return cls(**{f.name: data[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class StepTimes:
    """Run times of one step, beside those of a forward over the whole sequence.

    Attributes:
        step_ms: wall time of each step in milliseconds, the checks of the state included.
        forward_ms: of each forward, measured in turns with the steps.
        length: steps that the forward takes.
    """

    step_ms: tuple[float, ...]
    forward_ms: tuple[float, ...]
    length: int

    @property
    def speedup(self) -> float:
        """How many times faster one step is than running the forward again (medians)."""
        return median(self.forward_ms) / median(self.step_ms)

    def to_json(self) -> dict[str, Any]:
        return {
            "step_ms_p50": median(self.step_ms),
            "forward_ms_p50": median(self.forward_ms),
            "speedup": self.speedup,
            "length": self.length,
            "step_ms": list(self.step_ms),
            "forward_ms": list(self.forward_ms),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepTimes:
        return cls(tuple(data["step_ms"]), tuple(data["forward_ms"]), data["length"])


def _show(value: float | None) -> str:
    return "no finite value" if value is None else f"{value:.3g}"
