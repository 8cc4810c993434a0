"""Latency of a causal artifact's step, beside running its forward again for every token."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import numpy as np

from flowexport.core.findings import StepTimes
from flowexport.core.streaming import Stream, StreamState
from flowexport.core.types import Session

STEPS_A_ROUND = 20
MAX_ROUNDS = 2_000


def measure_steps(
    stream: Stream,
    reset: StreamState,
    feeds: Mapping[str, np.ndarray],
    forward: Session,
    sequence: Mapping[str, np.ndarray],
    *,
    warmup: int = 10,
    min_runs: int = 50,
    min_seconds: float = 1.0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> StepTimes:
    """Measure steps and forwards in turns: 20 steps, one forward, and again.

    The steps go on from each other's state, as in use, and start anew each
    round. Raw times are kept; the garbage collector is off meanwhile.

    Args:
        reset: the state before the first step.
        feeds: one step's input.
        forward: session of the forward to compare with.
        sequence: its input, (1, length, ...).
        min_runs: forwards at least; there are 20 times as many steps.
        min_seconds: measured time at least, forwards and steps together.
        clock: nanoseconds, monotonic.
    """
    steps: list[int] = []
    forwards: list[int] = []
    state = reset
    for _ in range(warmup):
        _, state = stream.step(feeds, state)
        forward.run(sequence)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for rounds in range(1, MAX_ROUNDS + 1):
            state = reset
            for _ in range(STEPS_A_ROUND):
                start = clock()
                _, state = stream.step(feeds, state)
                steps.append(clock() - start)
            start = clock()
            forward.run(sequence)
            forwards.append(clock() - start)
            if rounds >= min_runs and sum(steps) + sum(forwards) >= min_seconds * 1e9:
                break
    finally:
        if collecting:
            gc.enable()
    length = next(iter(sequence.values())).shape[1]
    return StepTimes(tuple(t / 1e6 for t in steps), tuple(t / 1e6 for t in forwards), int(length))
