"""Every value that a package's program computes, by the reference interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from flowexport.core.types import Artifact, Precision
from flowexport.targets.coreml.interpreter import InterpreterSession, Mode


def trace(
    artifact: Artifact, feeds: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, operator and array of every result, in execution order; interpreted."""
    half = artifact.precision is not Precision.FP32  # as its session
    function = artifact.entry if artifact.functions else None
    with InterpreterSession(artifact, Mode.FP16 if half else Mode.EXACT, function) as session:
        for value in session.values(feeds):
            if isinstance(value.array, np.ndarray):
                yield value.output_name, value.op_type, value.array
