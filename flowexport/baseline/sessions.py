"""Loaded artifacts side by side: outputs compared first, then measured interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.bench import Ratio, measure, ratio_of_medians
from flowexport.core.errors import VerificationError
from flowexport.core.reports import LatencyReport
from flowexport.core.types import Session

if TYPE_CHECKING:
    from flowexport.baseline.steps import StepComparison

BASELINE, OURS, LIMIT = "baseline", "ours", "limit"
MEMORY_METHOD = (
    "VmHWM of a child that loads the file and runs it 5 times, above its resident memory before"
)


@dataclass(frozen=True)
class Comparison:
    """Ours beside the baseline on one target.

    Attributes:
        ratio: baseline's median over ours; above 1 ours is faster.
        limit: baseline's median over that of the same model with its attentions
            reduced to their projections, through our conversion.
        latency: raw measurements of ``baseline``, ``ours`` and ``limit``.
        max_abs, max_rel: largest difference of ours from the baseline, absolute
            and over the baseline's largest output of that case.
        cases: inputs that the outputs were compared on.
        operators: of the three files, by name, functions inlined, constants left out.
        memory: extra bytes at the peak of loading and running, None where unknown.
        form: what lowering took.
        clock: ``thread_cpu`` (one thread) or ``wall``.
        step: of a causal model exported with its step, else None.
    """

    target: str
    ratio: Ratio
    limit: Ratio
    latency: Mapping[str, LatencyReport]
    max_abs: float
    max_rel: float
    cases: int
    operators: Mapping[str, Mapping[str, int]]
    memory: Mapping[str, int | None]
    form: str
    clock: str
    step: StepComparison | None = None

    def p50(self, name: str) -> float:
        """Return the median latency in ms of ``baseline``, ``ours`` or ``limit``."""
        return float(np.median(self.latency[name].samples_ms))

    def to_json(self) -> dict[str, Any]:
        ours = self.latency[OURS]
        return {
            "ratio": self.ratio.to_json(),
            "limit_ratio": self.limit.median,
            "limit": self.limit.to_json(),
            "baseline_ms_p50": self.p50(BASELINE),
            "latency_ms_p50": self.p50(OURS),
            "limit_ms_p50": self.p50(LIMIT),
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "compared_cases": self.cases,
            "operators": {
                name: {"total": sum(counts.values()), "by_name": dict(counts)}
                for name, counts in self.operators.items()
            },
            "peak_memory": {
                **{f"{name}_extra_bytes": value for name, value in self.memory.items()},
                "method": MEMORY_METHOD,
            },
            "form": self.form,
            "clock": self.clock,
            "threads": ours.threads,
            "runtime": ours.runtime,
            "machine": ours.machine,
            "load_before": ours.load_before,
            "load_after": ours.load_after,
            **({} if self.step is None else {"step": self.step.to_json()}),
        }


def compare_sessions(
    sessions: Mapping[str, Session],
    cases: Sequence[Mapping[str, np.ndarray]],
    feeds: Mapping[str, np.ndarray],
    *,
    max_rel: float,
    warmup: int = 3,
    rounds: int = 50,
    min_seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the outputs of ``ours`` with ``baseline``'s, then measure all interleaved.

    One thread is measured by the CPU time of the calling thread, on which
    both runtimes then work: other load of the machine is not counted. More
    threads are measured by wall time.

    Args:
        sessions: ``baseline``, ``ours`` and ``limit``.
        cases: inputs to compare the outputs on.
        feeds: inputs to measure with.
        max_rel: largest difference over the baseline's largest output of a case.

    Raises:
        VerificationError: the outputs disagree, or a session cannot run.
    """
    where = f"bench {sessions[OURS].artifact.target} {sessions[OURS].artifact.model}"
    max_abs, worst = difference(sessions[BASELINE], sessions[OURS], cases, max_rel, where)
    threads = sessions[OURS].info.threads
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    reports = measure(
        sessions,
        feeds,
        warmup=warmup,
        min_runs=rounds,
        min_seconds=min_seconds,
        progress=progress,
        clock=clock,
    )
    for kind, report in reports.items():
        if report.not_run is not None:
            raise VerificationError(f"{where}: {kind} cannot be measured: {report.not_run}.")
    times = {kind: report.samples_ms for kind, report in reports.items()}
    artifact = sessions[OURS].artifact
    return Comparison(
        target=artifact.target,
        ratio=ratio_of_medians(times[BASELINE], times[OURS]),
        limit=ratio_of_medians(times[BASELINE], times[LIMIT]),
        latency=reports,
        max_abs=max_abs,
        max_rel=worst,
        cases=len(cases),
        operators={},
        memory={},
        form=artifact.form,
        clock="thread_cpu" if threads == 1 else "wall",
    )


def difference(
    baseline: Session,
    ours: Session,
    cases: Sequence[Mapping[str, np.ndarray]],
    max_rel: float,
    where: str,
) -> tuple[float, float]:
    """Return the largest absolute and relative difference of ours from the baseline.

    Raises:
        VerificationError: it is above ``max_rel``, or an output is not finite.
    """
    pairs = ((baseline.run(feeds), ours.run(feeds)) for feeds in cases)
    return check_difference(pairs, max_rel, where)


def check_difference(
    pairs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    max_rel: float,
    where: str,
) -> tuple[float, float]:
    """Return the largest absolute and relative difference of outputs from those wanted.

    Args:
        pairs: the baseline's outputs and ours, by name.

    Raises:
        VerificationError: it is above ``max_rel``, or an output is not finite.
    """
    from flowexport.parity import compare

    max_abs = worst = 0.0
    for wanted, got in pairs:
        for name, value in wanted.items():
            found = compare("", name, got[name], value.astype(np.float64), dtype=value.dtype.name)
            if found.problem is not None:
                raise VerificationError(f"{where}: {name} {found.problem}; no ratio is given.")
            assert found.max_abs is not None and found.max_rel is not None
            max_abs, worst = max(max_abs, found.max_abs), max(worst, found.max_rel)
    if not worst <= max_rel:
        raise VerificationError(
            f"{where}: ours differs from the baseline by {worst:.1e} of its largest output;"
            f" expected at most {max_rel:.1e}, so no ratio is given.",
            fix="`flowexport convert` with verification tells which output is wrong",
        )
    return max_abs, worst
