"""Raw run times, and whether they can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flowexport.core.reports import LatencyReport
from flowexport.core.types import Verdict

MIN_RUNS = 10
"""Fewer tell neither a median's noise nor a tail."""

LONGEST_MS = 3_600_000.0
"""One hour: no run of these models takes it; a clock in another unit may say so."""

PARTS = ("pre_ms", "inference_ms", "post_ms")


@dataclass(frozen=True)
class Timing:
    """Times of consecutive runs; PASS means only that they can be believed.

    Attributes:
        samples: part (``pre_ms``, ``inference_ms``, ``post_ms``) -> times, None where not taken.
        duration_ms: wall time of all runs together, or None.
        not_run: why nothing was measured.
    """

    samples: Mapping[str, Sequence[float | None] | None]
    warmup: int | None = None
    batch: int | None = None
    duration_ms: float | None = None
    not_run: str | None = None

    @classmethod
    def from_report(cls, data: Mapping[str, Any] | None) -> Timing:
        """Read a device report's ``latency`` or ``sustained``."""
        if data is None:
            return cls({}, not_run="not measured")
        return cls(
            {part: data[part] for part in PARTS},
            warmup=data["warmup"],
            batch=data["batch"],
            duration_ms=data["duration_ms"],
        )

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Everything absurd in the samples."""
        found: list[str] = []
        inference = self.samples.get("inference_ms")
        for part in PARTS:
            values = self.samples.get(part)
            if values is None:
                continue
            found += _absurd(part, values)
            if inference is not None and len(values) != len(inference):
                found.append(
                    f"{part} has {len(values)} samples; expected {len(inference)}, one a run"
                )
        if self.duration_ms is not None and not 0 <= self.duration_ms < math.inf:
            found.append(f"duration_ms is {self.duration_ms:g}; expected 0 or more")
        elif not found and self.duration_ms is not None and inference:
            total = sum(v for v in inference if v is not None)
            if total > self.duration_ms * 1.01 + 1.0:  # a coarse clock rounds each sample
                found.append(
                    f"the samples add up to {total:.1f} ms within {self.duration_ms:.1f} ms"
                )
        return tuple(found)

    @property
    def too_few(self) -> str | None:
        count = len(self.samples.get("inference_ms") or ())
        if self.not_run is not None:
            return self.not_run
        return f"{count} runs; expected at least {MIN_RUNS}" if count < MIN_RUNS else None

    @property
    def verdict(self) -> Verdict:
        if self.problems:
            return Verdict.FAIL
        return Verdict.NOT_RUN if self.too_few else Verdict.PASS

    @property
    def reason(self) -> str | None:
        return "; ".join(self.problems) or self.too_few

    @property
    def usable(self) -> list[float]:
        """The inference times in order, or nothing where they cannot be believed."""
        if self.verdict is not Verdict.PASS:
            return []
        return [float(v) for v in self.samples["inference_ms"] or () if v is not None]

    def statistics(self) -> dict[str, Any]:
        """Return percentiles of the inference, and medians of the other parts; else null."""
        report = LatencyReport("", tuple(self.usable))
        found = {k: v for k, v in report.summary().items() if k.startswith("latency_ms_")}
        for part in ("pre_ms", "post_ms"):
            values = tuple(float(v or 0.0) for v in self.samples.get(part) or ())
            usable = values if self.usable else ()
            found[f"{part}_p50"] = LatencyReport("", usable).p50
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "warmup": self.warmup,
            "batch": self.batch,
            "duration_ms": self.duration_ms,
            **{
                part: None if self.samples.get(part) is None else list(self.samples[part] or ())
                for part in PARTS
            },
            "statistics": self.statistics(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        samples = {part: data[part] for part in PARTS if data[part] is not None}
        reason = None if samples else data["reason"]
        return cls(samples, data["warmup"], data["batch"], data["duration_ms"], reason)


def _absurd(part: str, values: Sequence[float | None]) -> list[str]:
    found = []
    counts = {
        "missing": sum(v is None for v in values),
        "negative": sum(v is not None and v < 0 for v in values),
        "above one hour": sum(v is not None and v > LONGEST_MS for v in values),
    }
    for word, count in counts.items():
        if count:
            found.append(f"{part}: {count} of {len(values)} samples are {word}")
    zeros = sum(v == 0 for v in values)
    if part == "inference_ms" and zeros:
        found.append(
            f"{part}: {zeros} of {len(values)} samples are 0: the clock is too coarse, or nothing"
            " was run"
        )
    return found
