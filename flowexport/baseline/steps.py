"""One step of a causal model beside running the published forward again for every token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flowexport.baseline.sessions import check_difference
from flowexport.bench import Ratio, measure_steps, ratio_of_unpaired_medians
from flowexport.core.findings import StepTimes
from flowexport.core.streaming import Stream, StreamState
from flowexport.core.types import STEP, Artifact
from flowexport.ops.installed import installed_ops
from flowexport.registry import TARGETS
from flowexport.resolve import Subject


@dataclass(frozen=True)
class StepComparison:
    """Our step beside the baseline's whole forward.

    Attributes:
        ratio: the forward's median over the step's.
        max_rel: largest difference of as many steps from one forward, over its largest output.
    """

    ratio: Ratio
    times: StepTimes
    max_rel: float

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio.to_json(),
            "length": self.times.length,
            "step_ms_p50": median(self.times.step_ms),
            "forward_ms_p50": median(self.times.forward_ms),
            "max_rel": self.max_rel,
        }


def stream_program(subject: Subject, path: Path) -> None:
    """Lower a causal model with its step, as a conversion does, and save it."""
    import copy

    from flowexport.lowering import lower_streaming

    spec = subject.spec
    lower_streaming(
        copy.deepcopy(subject.module),
        spec.inputs,
        spec.output_names,
        name=spec.name,
        ops=installed_ops(),
        recipe_sha256=subject.recipe_sha256,
    ).save(path)


def compare_steps(
    module: Any,
    ours: Artifact,
    baseline: Artifact,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    max_rel: float,
    warmup: int,
    rounds: int,
    min_seconds: float,
) -> StepComparison:
    """Hold as many steps as the baseline's forward takes to its outputs, then measure in turns.

    Args:
        module: a :class:`flowexport.lowering.StreamingModule`; its reset state begins.
        ours: with a ``step``.
        baseline: the stock export of the published forward.
        feeds: its one input, (1, L, ...).

    Raises:
        VerificationError: a step does not give the forward's output at its place.
    """
    target = TARGETS.get(ours.target)
    ((name, sequence),) = feeds.items()
    reset = StreamState(
        ours.recipe_sha256, {n: v.numpy() for n, v in module.initial_state().items()}
    )
    frames = [{name: np.ascontiguousarray(sequence[:, t])} for t in range(sequence.shape[1])]
    with ExitStack() as stack:
        forward = stack.enter_context(target.load(baseline, threads=threads))
        stream = Stream(stack.enter_context(target.load(ours.function(STEP), threads=threads)))
        rows, state = [], reset
        for frame in frames:
            results, state = stream.step(frame, state)
            rows.append(results)
        wanted = forward.run(feeds)
        got = {n: np.stack([r[n] for r in rows], axis=1) for n in wanted}
        where = f"bench {ours.target} {ours.model}: step"
        _, worst = check_difference([(wanted, got)], max_rel, where)
        times = measure_steps(
            stream,
            reset,
            frames[0],
            forward,
            feeds,
            warmup=warmup,
            min_runs=rounds,
            min_seconds=min_seconds,
            clock=time.thread_time_ns if threads == 1 else time.perf_counter_ns,
        )
    ratio = ratio_of_unpaired_medians(times.forward_ms, times.step_ms)
    return StepComparison(ratio, times, worst)
