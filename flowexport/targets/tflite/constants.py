"""The numbers in a TFLite file."""

from __future__ import annotations

from typing import Any

import numpy as np

_NUMPY = ("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")


def constants(model: Any) -> dict[str, np.ndarray]:
    """Return the constants' values, and the scales and zero points of all tensors.

    Names are numbers: of the graph, and of the tensor in it. 4-bit values stay in their bytes.
    """
    from ai_edge_litert.schema_py_generated import TensorType

    dtypes = {getattr(TensorType, name.upper()): name for name in _NUMPY}
    found = {}
    for g, graph in enumerate(model.subgraphs):
        for t, tensor in enumerate(graph.tensors):
            data, kind = model.buffers[tensor.buffer].data, dtypes.get(int(tensor.type))
            if data is not None and len(data):
                content = np.asarray(data, np.uint8).tobytes()
                found[f"{g}.{t}"] = np.frombuffer(content, kind or np.uint8)
            quantisation = tensor.quantization
            for part in ("scale", "zeroPoint"):
                values = None if quantisation is None else getattr(quantisation, part)
                if values is not None and len(values):
                    found[f"{g}.{t} {part}"] = np.asarray(values)
    return found
