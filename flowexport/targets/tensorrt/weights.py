"""The weights inside an engine, found by their values: what can be checked without a GPU.

TensorRT-RTX keeps float weights as the ONNX file has them, so each is found by
its bytes when the engine is made, and its values are read back and summed later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.stored import moments, same_moments

SMALLEST = 8
"""Values of the smallest tensor that is looked for; shorter ones turn up anywhere."""


def find_weights(engine: bytes, onnx_file: Path) -> list[dict[str, Any]]:
    """Return name, shape, dtype, place and moments of each float weight of an ONNX file.

    Returns:
        One entry a weight of 8 values or more; ``offset`` is None where the
        builder stored it in another layout or folded it away.
    """
    import onnx
    from onnx import numpy_helper

    found = []
    last = 0
    for tensor in onnx.load(onnx_file).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind != "f" or values.size < SMALLEST:
            continue
        content = np.ascontiguousarray(values).tobytes()
        place = engine.find(content, last)
        if place < 0:
            place = engine.find(content, 0, last + len(content))
        last = max(place, 0) or last
        found.append(
            {
                "name": tensor.name,
                "shape": list(values.shape),
                "dtype": values.dtype.name,
                "offset": place if place >= 0 else None,
                "moments": moments(values),
            }
        )
    return found


def changed_weights(engine: bytes, recorded: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each recorded weight whose values are no longer in their place."""
    problems = []
    for entry in recorded:
        if entry["offset"] is None:
            continue
        dtype = np.dtype(entry["dtype"])
        size = int(np.prod(entry["shape"]))
        content = engine[entry["offset"] : entry["offset"] + size * dtype.itemsize]
        whole = len(content) == size * dtype.itemsize
        have = moments(np.frombuffer(content, dtype)) if whole else []
        wanted = list(entry["moments"])
        if not same_moments(have, wanted, size):
            told = ", ".join(f"{v:.6g}" for v in have) or "not all there"
            problems.append(
                f"weight {entry['name']} has sum, squares and ramp {told};"
                f" expected {', '.join(f'{v:.6g}' for v in wanted)}"
            )
    return problems
