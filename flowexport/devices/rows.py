"""One row of the comparison: a model file on a backend of a device, and what was found of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowexport.core.reports import AccuracyResult, CaseResult, Tolerance, finite
from flowexport.core.types import Verdict
from flowexport.devices.timing import Timing

KEY = ("device", "client", "model", "format", "backend", "threads", "precision")


@dataclass(frozen=True)
class Agreement:
    """Outputs against the golden ones.

    Attributes:
        evidence: ``outputs`` recomputed here, or ``bundle`` as `flowexport verify` measured.
        problems: what stands between it and PASS.
        not_run: why nothing was compared.
    """

    cases: tuple[CaseResult, ...] = ()
    tolerance: Tolerance | None = None
    evidence: str = "outputs"
    problems: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def verdict(self) -> Verdict:
        return _verdict(self.problems, self.not_run, bool(self.cases))

    @property
    def reason(self) -> str | None:
        if self.problems:
            return _shorten(self.problems)
        return self.not_run or (None if self.cases else "no golden case was run")

    def worst(self, metric: str) -> float | None:
        values = [getattr(c, metric) for c in self.cases if getattr(c, metric) is not None]
        if not values or any(c.problem for c in self.cases):
            return None
        return finite(max(values) if metric.startswith("max") else min(values))

    def to_json(self) -> dict[str, Any]:
        tolerance = self.tolerance
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "problems": list(self.problems),
            "evidence": self.evidence,
            "max_abs": self.worst("max_abs"),
            "max_rel": self.worst("max_rel"),
            "cosine": self.worst("cosine"),
            "sqnr_db": self.worst("sqnr_db"),
            "tolerance": None if tolerance is None else tolerance.to_json(),
            "cases": [] if tolerance is None else [c.to_json(tolerance) for c in self.cases],
        }


@dataclass(frozen=True)
class Accuracy:
    """Predictions over the evaluation set."""

    result: AccuracyResult | None = None
    problems: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def verdict(self) -> Verdict:
        if self.problems:
            return Verdict.FAIL
        return Verdict.NOT_RUN if self.result is None else Verdict.PASS

    @property
    def reason(self) -> str | None:
        return _shorten(self.problems) or self.not_run

    def to_json(self) -> dict[str, Any]:
        result = self.result
        counts = (
            "dataset", "expected_samples", "samples", "correct", "reference_correct", "agreement",
            "accuracy", "reference_accuracy",
        )  # fmt: skip
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "problems": list(self.problems),
            **{k: None if result is None else getattr(result, k) for k in counts},
        }


@dataclass(frozen=True)
class InputCheck:
    """A client's own preprocessing against the golden inputs."""

    compared: int = 0
    max_abs: float | None = None
    problems: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def verdict(self) -> Verdict:
        return _verdict(self.problems, self.not_run, bool(self.compared))

    @property
    def reason(self) -> str | None:
        return _shorten(self.problems) or self.not_run

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "problems": list(self.problems),
            "compared": self.compared,
            "max_abs": self.max_abs,
        }


@dataclass(frozen=True)
class Row:
    """Everything on one run; its verdict follows from the parts.

    FAIL where a part fails or the client met an error. PASS needs the outputs'
    agreement, and the accuracy where there is an evaluation set. Else NOT_RUN.

    Attributes:
        key: one value for each of :data:`KEY`, then a number that tells repetitions apart.
        facts: what the report says of device, runtime, load, memory, power; as JSON.
        has_evaluation: whether the reference has an evaluation set.
    """

    key: Mapping[str, Any]
    source: str
    model_sha256: str | None
    size_bytes: int | None
    agreement: Agreement
    accuracy: Accuracy
    preprocessing: InputCheck
    latency: Timing
    sustained: Timing
    facts: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[Mapping[str, str]] = ()
    has_evaluation: bool = False

    @property
    def label(self) -> str:
        """Say device and backend in one line."""
        threads = self.key["threads"]
        number = self.key["repetition"]
        parts = [str(self.key["device"]), str(self.key["backend"])]
        parts += [f"{threads} thread{'' if threads == 1 else 's'}"] if threads else []
        parts += [f"#{number}"] if number > 1 else []
        return " · ".join(parts)

    @property
    def problems(self) -> list[str]:
        """Return all of it, with the part's name before each."""
        found = [f"{e['stage']}: {e['message']}" for e in self.errors]
        found += [f"outputs: {p}" for p in self.agreement.problems]
        found += [f"accuracy: {p}" for p in self.accuracy.problems]
        found += [f"preprocessing: {p}" for p in self.preprocessing.problems]
        found += [f"latency: {p}" for p in self.latency.problems]
        found += [f"sustained: {p}" for p in self.sustained.problems]
        return found

    @property
    def verdict(self) -> Verdict:
        if self.problems:
            return Verdict.FAIL
        needed = [self.agreement.verdict] + [self.accuracy.verdict] * self.has_evaluation
        return Verdict.PASS if set(needed) == {Verdict.PASS} else Verdict.NOT_RUN

    @property
    def gaps(self) -> list[str]:
        """Return what was not run, with its reason."""
        parts: dict[str, Agreement | Accuracy | InputCheck | Timing] = {
            "outputs": self.agreement,
            "accuracy": self.accuracy,
            "preprocessing": self.preprocessing,
            "latency": self.latency,
        }
        return [
            f"{name}: {part.reason or 'not run'}"
            for name, part in parts.items()
            if part.verdict is Verdict.NOT_RUN
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "key": dict(self.key),
            "label": self.label,
            "verdict": self.verdict.value,
            "problems": self.problems,
            "gaps": self.gaps,
            "source": self.source,
            "model_sha256": self.model_sha256,
            "size_bytes": self.size_bytes,
            "agreement": self.agreement.to_json(),
            "accuracy": self.accuracy.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            "latency": self.latency.to_json(),
            "sustained": self.sustained.to_json(),
            "facts": dict(self.facts),
            "errors": [dict(e) for e in self.errors],
        }


def _verdict(problems: Sequence[str], not_run: str | None, compared: bool) -> Verdict:
    """FAIL with any problem; NOT_RUN where nothing was compared; else PASS."""
    if problems:
        return Verdict.FAIL
    return Verdict.NOT_RUN if not_run or not compared else Verdict.PASS


def _shorten(problems: Sequence[str]) -> str | None:
    if not problems:
        return None
    return problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more)"
