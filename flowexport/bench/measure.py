"""Latency of several sessions in one process, one run of each a round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flowexport.bench.machine import load_average, machine_facts
from flowexport.core.errors import InputError
from flowexport.core.reports import LatencyReport
from flowexport.core.types import Session, TensorSpec

MAX_RUNS = 100_000


def measure(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, np.ndarray],
    *,
    warmup: int = 10,
    min_runs: int = 50,
    min_seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, LatencyReport]:
    """Measure the wall time of ``session.run`` for every session, interleaved.

    Every round runs each session once, and every round starts with another
    one, so that drift of the machine (heat, frequency, other load) meets all
    alike and round ``i`` of two targets can be paired. Rounds go on until each
    session has ``min_runs`` runs and ``min_seconds`` of measured time. The
    garbage collector is off while measuring; raw samples are kept, none is dropped.

    Args:
        sessions: target name -> loaded session.
        feeds: inputs of one batch that every session takes.
        progress: called with (rounds done, rounds needed so far).
        clock: nanoseconds, monotonic.

    Returns:
        One report a session. A session that raises gets a report without
        samples and the reason; the others are still measured.

    Raises:
        InputError: ``min_runs`` or ``warmup`` is not positive.
    """
    for name, value in (("min_runs", min_runs), ("warmup", warmup)):
        if value < 1:
            raise InputError(f"bench: {name} has {value}; expected 1 or more.")
    reports = {name: _empty(name, s, feeds) for name, s in sessions.items()}
    active = dict(sessions)
    for name, session in sessions.items():
        try:
            for _ in range(warmup):
                session.run(feeds)
        except Exception as error:
            reports[name] = _broken(reports[name], error)
            del active[name]

    samples: dict[str, list[int]] = {name: [] for name in active}
    machine, before = machine_facts(), load_average()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        rounds = 0
        while active:
            rounds += 1
            names = list(active)
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                session = active[name]
                try:
                    samples[name].append(_timed(session, feeds, clock))
                except Exception as error:
                    reports[name] = _broken(reports[name], error)
                    del active[name], samples[name]
            spent = min((sum(s) / 1e9 for s in samples.values()), default=0.0)
            if rounds >= min_runs and (spent >= min_seconds or rounds >= MAX_RUNS):
                break
            if progress is not None:
                by_time = rounds * min_seconds / spent if spent > 0 else min_runs
                progress(rounds, max(min_runs, int(min(by_time, MAX_RUNS)) + 1))
    finally:
        if collecting:
            gc.enable()
    after = load_average()
    for name, times in samples.items():
        reports[name] = replace(
            reports[name],
            samples_ms=tuple(t / 1e6 for t in times),
            warmup=warmup,
            runtime=sessions[name].info.to_json(),
            machine=machine,
            load_before=before,
            load_after=after,
            together_with=tuple(n for n in samples if n != name),
        )
    return reports


def _timed(session: Session, feeds: Mapping[str, np.ndarray], clock: Callable[[], int]) -> int:
    """Return the nanoseconds of a run; of another where the clock stood still.

    A thread's CPU clock did that on a virtual machine, once in some ten thousand runs.
    """
    elapsed = 0
    for _ in range(3):
        start = clock()
        session.run(feeds)
        if (elapsed := clock() - start) > 0:
            break
    return elapsed


def bench_feeds(inputs: Sequence[TensorSpec], case: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return one sample of a golden case as the feeds to measure with.

    Args:
        inputs: the artifact's inputs; a fixed batch above 1 repeats the sample.
    """
    feeds = {}
    for spec in inputs:
        size = spec.static().shape[0] if spec.shape else 1
        feeds[spec.name] = np.repeat(case[spec.name][:1], int(size), axis=0)
    return feeds


def _empty(name: str, session: Session, feeds: Mapping[str, np.ndarray]) -> LatencyReport:
    return LatencyReport(
        target=name,
        threads=session.info.threads,
        runtime=session.info.to_json(),
        input_shapes={k: list(v.shape) for k, v in feeds.items()},
    )


def _broken(report: LatencyReport, error: Exception) -> LatencyReport:
    text = " ".join(str(error).split())[:300]
    return replace(report, not_run=f"the runtime raised {type(error).__name__}: {text}")
