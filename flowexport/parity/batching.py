"""Runs a batch of any size on artifacts of fixed or dynamic batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.types import Session

CHUNK = 32
"""Samples a call on an artifact with a dynamic batch."""


def run_batched(
    session: Session,
    feeds: Mapping[str, np.ndarray],
    *,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Run samples (first dimension of every input) in batches that the artifact takes.

    A dynamic batch gets ``chunk`` samples a call or as many as the session
    takes, a fixed batch of ``n`` gets ``n``; the last call repeats its last
    sample to fill up, and the surplus is dropped.

    Args:
        progress: called with (samples done, samples) after each call.

    Returns:
        One array an output, samples first.

    Raises:
        InputError: the feeds' first dimensions differ, or there is no sample.
    """
    counts = {len(v) if v.ndim else 0 for v in feeds.values()}
    where = f"verify {session.artifact.target} {session.artifact.model}"
    if len(counts) != 1 or 0 in counts:
        raise InputError(
            f"{where}: the feeds have {sorted(counts)} samples; expected one number above 0."
        )
    total = counts.pop()
    parts: dict[str, list[np.ndarray]] = {}
    for start, stop, size in _slices(session, total, chunk):
        piece = {}
        for name, value in feeds.items():
            part = value[start:stop]
            if len(part) < size:
                part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            piece[name] = np.ascontiguousarray(part)
        for name, value in session.run(piece).items():
            if value.shape[:1] != (size,):
                raise InputError(
                    f"{where}: {name} has shape {list(value.shape)} for a batch of {size}; "
                    f"expected {size} rows."
                )
            parts.setdefault(name, []).append(np.array(value[: stop - start]))
        if progress is not None:
            progress(stop, total)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _slices(session: Session, total: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    fixed = [s.shape[0] for s in session.artifact.inputs if s.shape and isinstance(s.shape[0], int)]
    size = int(fixed[0]) if fixed else min(chunk, total, session.max_batch or chunk)
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield start, stop, size if fixed else stop - start
