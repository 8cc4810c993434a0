"""Evidence: what was compared and measured. Verdicts are derived, never stored.

A report holds raw findings. ``verdict``, ``reason`` and every aggregate are
computed from them, also after ``from_json``: editing a verdict in a file
changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowexport.core.findings import (
    AccuracyResult,
    BucketResult,
    CaseResult,
    StepTimes,
    StreamResult,
    finite,
)
from flowexport.core.tolerances import REAL_SET, Tolerance
from flowexport.core.types import Verdict

__all__ = [
    "EVALUATION_PREFIX",
    "AccuracyResult",
    "BucketResult",
    "CaseResult",
    "LatencyReport",
    "ParityReport",
    "StepTimes",
    "StreamResult",
    "Tolerance",
    "finite",
    "verdict_of",
]

EVALUATION_PREFIX = f"{REAL_SET}/"
"""Name prefix of the case that compares the outputs of the whole evaluation set."""
LEAST_JUDGED = 3
"""Cases that have to lie inside a file's calibrated ranges, where some do not."""


@dataclass(frozen=True)
class ParityReport:
    """All evidence on one artifact; PASS only where every requirement is shown.

    PASS needs: a non-empty expected set, every expected (case, output)
    compared exactly once and none other, same shape and dtype, finite values,
    the tolerance met, the fusions that the recipe asks for found, and the
    artifact's hash equal to the manifest's (unless ``hash_checked`` is False).

    Attributes:
        target: name, e.g. ``onnx``.
        artifact_sha256: hash of the bytes that were run, or None where there are none.
        manifest_sha256: hash that the manifest promises; None where nothing was converted.
        reference: what the outputs were compared with, in words.
        runtime: ``RuntimeInfo`` as JSON, with ``label``; None where nothing ran.
        required_fusions, fusions: asked for by the recipe; found in the finished file.
        mismatches: where the file's own description (model, labels ...) is not the manifest's.
        fix: the command that mends a NOT_RUN.
        failure: what stopped the check (a runtime's exception), or None.
        stream: what the steps of a causal artifact gave; None elsewhere.
        buckets: predictions of a bucketed artifact's shorter lengths.
    """

    target: str
    artifact_sha256: str | None
    manifest_sha256: str | None
    tolerance: Tolerance
    reference: str
    expected: tuple[tuple[str, str], ...] = ()
    cases: tuple[CaseResult, ...] = ()
    accuracy: AccuracyResult | None = None
    runtime: Mapping[str, Any] | None = None
    required_fusions: Mapping[str, int] = field(default_factory=dict)
    fusions: Mapping[str, int] = field(default_factory=dict)
    mismatches: tuple[str, ...] = ()
    hash_checked: bool = True
    not_run: str | None = None
    fix: str | None = None
    failure: str | None = None
    stream: StreamResult | None = None
    buckets: tuple[BucketResult, ...] = ()

    @property
    def judged(self) -> tuple[CaseResult, ...]:
        """The cases but those that lie outside the calibrated ranges."""
        return tuple(c for c in self.cases if not c.outside(self.tolerance))

    @property
    def outside(self) -> tuple[CaseResult, ...]:
        """The cases that were run but not judged: outside the calibrated ranges."""
        return tuple(c for c in self.cases if c.outside(self.tolerance))

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that stands between this artifact and PASS, the gravest first."""
        if self.not_run is not None:
            return (self.not_run,)
        found: list[str] = []
        if self.hash_checked and self.artifact_sha256 != self.manifest_sha256:
            found.append(
                f"the file's sha256 is {_short(self.artifact_sha256)}; the manifest has "
                f"{_short(self.manifest_sha256)}"
            )
        if self.failure is not None:
            found.append(self.failure)
        for name, count in self.required_fusions.items():
            have = self.fusions.get(name, 0)
            if have != count:
                found.append(f"the file holds {have} {name}; expected {count}")
        found += self.mismatches
        if found and not self.cases:
            return tuple(found)
        found += self._coverage()
        broken = [c for c in self.cases if c.violation(self.tolerance)]
        broken.sort(key=lambda c: (c.problem is None, -(c.max_rel or 0.0)))
        found += [str(c.violation(self.tolerance)) for c in broken]
        inside = {c.case for c in self.judged}
        if self.outside and len(inside) < LEAST_JUDGED:
            found.append(
                f"{len(inside)} of {len({c.case for c in self.cases})} cases lie inside the"
                f" calibrated ranges; expected at least {LEAST_JUDGED} to judge"
            )
        low, share = self.tolerance.min_top1_agreement, self.top1_agreement
        if low is not None and share is not None and not share >= low:
            found.append(f"top-1 agreement is {share:.4f}; expected >= {low:g}")
        if self.accuracy is not None:
            violation = self.accuracy.violation(self.tolerance)
            found += [violation] if violation else []
        elif (
            self.tolerance.max_accuracy_drop is not None
            or self.tolerance.min_prediction_agreement is not None
        ):
            found.append("the tolerance limits the accuracy, but no evaluation set was run")
        found += [v for b in self.buckets if (v := b.violation(self.tolerance))]
        return tuple(found)

    def _coverage(self) -> list[str]:
        """Every expected pair exactly once, and nothing else."""
        if not self.expected:
            return ["no case was expected: nothing would be shown"]
        found = []
        wanted, have = Counter(self.expected), Counter((c.case, c.output) for c in self.cases)
        for pair, count in wanted.items():
            if count > 1:
                found.append(f"{pair[0]}: {pair[1]} is expected {count} times; expected once")
            if have[pair] != 1:
                found.append(f"{pair[0]}: {pair[1]} was compared {have[pair]} times; expected once")
        found += [
            f"{c}: {o} was compared but not expected" for c, o in have if (c, o) not in wanted
        ]
        return found

    @property
    def verdict(self) -> Verdict:
        if self.not_run is not None:
            return Verdict.NOT_RUN
        return Verdict.FAIL if self.problems else Verdict.PASS

    @property
    def reason(self) -> str | None:
        """Why it is not PASS, in one line; None for PASS."""
        problems = self.problems
        if not problems:
            return None
        rest = len(problems) - 2
        return "; ".join(problems[:2]) + (f"; and {rest} more" if rest > 0 else "") + "."

    def _worst(self, name: str, pick: Any) -> float | None:
        values = [finite(getattr(c, name)) for c in self.judged]
        known = [v for v in values if v is not None]
        return pick(known) if known else None

    @property
    def max_abs(self) -> float | None:
        return self._worst("max_abs", max)

    @property
    def max_rel(self) -> float | None:
        return self._worst("max_rel", max)

    @property
    def cosine(self) -> float | None:
        return self._worst("cosine", min)

    @property
    def sqnr_db(self) -> float | None:
        return self._worst("sqnr_db", min)

    @property
    def top1_agreement(self) -> float | None:
        """Share of all rows of class scores, over all judged cases, whose arg max agrees."""
        rows = sum(c.rows for c in self.judged)
        return sum(c.top1_matches for c in self.judged) / rows if rows else None

    @property
    def runtime_label(self) -> str | None:
        return None if self.runtime is None else str(self.runtime.get("label"))

    @property
    def execution(self) -> str | None:
        """``native``, ``interpreted`` or ``emulated``; None where nothing ran."""
        return None if self.runtime is None else str(self.runtime.get("execution"))

    def summary(self) -> dict[str, Any]:
        """Return this target's entry in ``verify --json``."""
        return {
            "verdict": self.verdict.value,
            "runtime": self.runtime_label,
            "execution": self.execution,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db,
            "top1_agreement": self.top1_agreement,
            "accuracy": None if self.accuracy is None else self.accuracy.accuracy,
            "outside": [c.case for c in self.outside],
            "reason": self.reason,
            "fix": self.fix,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            **self.summary(),
            "problems": list(self.problems),
            "artifact_sha256": self.artifact_sha256,
            "manifest_sha256": self.manifest_sha256,
            "hash_checked": self.hash_checked,
            "reference": self.reference,
            "runtime_info": None if self.runtime is None else dict(self.runtime),
            "tolerance": self.tolerance.to_json(),
            "expected": [list(pair) for pair in self.expected],
            "cases": [c.to_json(self.tolerance) for c in self.cases],
            "evaluation": None if self.accuracy is None else self.accuracy.to_json(self.tolerance),
            "required_fusions": dict(self.required_fusions),
            "fusions": dict(self.fusions),
            "mismatches": list(self.mismatches),
            "not_run": self.not_run,
            "failure": self.failure,
            "stream": None if self.stream is None else self.stream.to_json(),
            "buckets": [b.to_json() for b in self.buckets],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ParityReport:
        accuracy, stream = data["evaluation"], data.get("stream")
        return cls(
            target=data["target"],
            artifact_sha256=data["artifact_sha256"],
            manifest_sha256=data["manifest_sha256"],
            tolerance=Tolerance.from_json(data["tolerance"]),
            reference=data["reference"],
            expected=tuple((str(c), str(o)) for c, o in data["expected"]),
            cases=tuple(CaseResult.from_json(c) for c in data["cases"]),
            accuracy=None if accuracy is None else AccuracyResult.from_json(accuracy),
            runtime=data["runtime_info"],
            required_fusions=data["required_fusions"],
            fusions=data["fusions"],
            mismatches=tuple(data.get("mismatches") or ()),
            hash_checked=data["hash_checked"],
            not_run=data["not_run"],
            fix=data["fix"],
            failure=data["failure"],
            stream=None if stream is None else StreamResult.from_json(stream),
            buckets=tuple(BucketResult.from_json(b) for b in data.get("buckets") or ()),
        )


@dataclass(frozen=True)
class LatencyReport:
    """Raw run times of one target, and the conditions they were taken under.

    Attributes:
        samples_ms: wall time of each measured run in milliseconds, in order.
        warmup: runs before them that were not measured.
        runtime: ``RuntimeInfo`` as JSON with ``label``.
        machine: what :func:`flowexport.bench.machine_facts` gives.
        load_before, load_after: 1-minute load average.
        together_with: targets measured in the same rounds.
        input_shapes: of the measured feeds.
        steps: run times of a causal artifact's steps; None elsewhere.
        lengths: those of a bucketed artifact's shorter functions, by name, in milliseconds.
    """

    target: str
    samples_ms: tuple[float, ...] = ()
    warmup: int = 0
    threads: int | None = None
    runtime: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    load_before: float | None = None
    load_after: float | None = None
    together_with: tuple[str, ...] = ()
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    steps: StepTimes | None = None
    lengths: Mapping[str, Sequence[float]] = field(default_factory=dict)
    not_run: str | None = None
    fix: str | None = None

    def __post_init__(self) -> None:
        if any(not math.isfinite(s) or s < 0 for s in self.samples_ms):
            raise ValueError(f"{self.target}: a run time is negative or not finite")

    @property
    def iterations(self) -> int:
        return len(self.samples_ms)

    def percentile(self, q: float) -> float | None:
        """Return the ``q``-th percentile (0..100) in ms, or None without samples."""
        return float(np.percentile(self.samples_ms, q)) if self.samples_ms else None

    @property
    def p50(self) -> float | None:
        return self.percentile(50)

    @property
    def execution(self) -> str | None:
        return None if self.runtime is None else str(self.runtime.get("execution"))

    def summary(self) -> dict[str, Any]:
        """Return this target's entry in ``bench --json``."""
        have = bool(self.samples_ms)
        return {
            "latency_ms_p50": self.percentile(50),
            "latency_ms_p90": self.percentile(90),
            "latency_ms_p99": self.percentile(99),
            "latency_ms_mean": float(np.mean(self.samples_ms)) if have else None,
            "latency_ms_std": float(np.std(self.samples_ms)) if have else None,
            "latency_ms_min": float(np.min(self.samples_ms)) if have else None,
            "threads": self.threads,
            "iterations": self.iterations,
            "runtime": None if self.runtime is None else self.runtime.get("label"),
            "execution": self.execution,
            "not_run": self.not_run,
            "fix": self.fix,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            **self.summary(),
            "warmup": self.warmup,
            "runtime_info": None if self.runtime is None else dict(self.runtime),
            "machine": dict(self.machine),
            "load_before": finite(self.load_before),
            "load_after": finite(self.load_after),
            "together_with": list(self.together_with),
            "input_shapes": {k: list(v) for k, v in self.input_shapes.items()},
            "samples_ms": list(self.samples_ms),
            "steps": None if self.steps is None else self.steps.to_json(),
            "lengths": {name: list(samples) for name, samples in self.lengths.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyReport:
        return cls(
            target=data["target"],
            samples_ms=tuple(float(s) for s in data["samples_ms"]),
            warmup=data["warmup"],
            threads=data["threads"],
            runtime=data["runtime_info"],
            machine=data["machine"],
            load_before=data["load_before"],
            load_after=data["load_after"],
            together_with=tuple(data["together_with"]),
            input_shapes=data["input_shapes"],
            steps=StepTimes.from_json(data["steps"]) if data.get("steps") else None,
            lengths={n: tuple(v) for n, v in (data.get("lengths") or {}).items()},
            not_run=data["not_run"],
            fix=data["fix"],
        )


def verdict_of(reports: Mapping[str, ParityReport], required: Iterable[str] = ()) -> Verdict:
    """Return the verdict over all targets.

    FAIL where any report is FAIL or a required target is absent or NOT_RUN;
    NOT_RUN where nothing ran at all; else PASS.
    """
    verdicts = {name: report.verdict for name, report in reports.items()}
    if Verdict.FAIL in verdicts.values():
        return Verdict.FAIL
    if any(verdicts.get(name) is not Verdict.PASS for name in required):
        return Verdict.FAIL
    return Verdict.PASS if Verdict.PASS in verdicts.values() else Verdict.NOT_RUN


def _short(sha256: str | None) -> str:
    return "missing" if sha256 is None else f"{sha256[:12]}…"
