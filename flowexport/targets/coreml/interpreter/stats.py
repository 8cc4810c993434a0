"""What every operator's results look like in float16: peaks and subnormals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowexport.targets.coreml.interpreter.machine import OpValue

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class OperatorStat:
    """One float result.

    Attributes:
        peak: largest magnitude of the finite values.
        subnormal_share: share of all values that are not zero and below float16's
            smallest normal number, 6.1e-5: what a flushing device loses.
        overflow_share: share of all values that float16 cannot hold (above 65504,
            infinite or NaN).
        rank: number of dimensions; above 5 Core ML refuses, 5 is slow on the ANE.
    """

    op_type: str
    output_name: str
    module_path: str | None
    peak: float
    subnormal_share: float
    overflow_share: float
    rank: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def operator_stats(values: Iterable[OpValue]) -> list[OperatorStat]:
    """Describe every float result of ``Interpreter.run_with_values``, in execution order."""
    stats = []
    for op_type, name, path, array in values:
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.size:
            continue
        magnitude = np.abs(array)
        finite = np.isfinite(magnitude)
        stats.append(
            OperatorStat(
                op_type,
                name,
                path,
                float(magnitude.max(where=finite, initial=0.0)),
                float(np.mean((magnitude > 0) & (magnitude < FP16_SMALLEST_NORMAL))),
                float(np.mean(~finite | (magnitude > FP16_MAX))),
                array.ndim,
            )
        )
    return stats
