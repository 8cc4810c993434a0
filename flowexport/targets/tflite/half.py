"""Large float constants beside the layers, stored in half precision behind DEQUANTIZE.

A table of positions is no layer, so no rule of a quantised precision takes it; in a small
model it weighs as much as a layer. XNNPACK widens it when it loads the file.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

LEAST = 4096
"""Bytes from which on a constant is worth an operator; biases are below it."""


def store_in_half(model: Any, least: int = LEAST) -> dict[str, int]:
    """Store the float32 constants of ``least`` bytes and more in float16, in place.

    Only those that are added or multiplied element by element, so no layer's weight and no
    embedding; and only where float16 holds them to 1e-3 of their largest value.

    Args:
        model: as objects of the TFLite schema.

    Returns:
        How many constants, and the bytes saved: ``{"constants", "bytes_saved"}``.
    """
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.BuiltinOperator
    plain = (kinds.ADD, kinds.SUB, kinds.MUL)
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    others = {
        graph.tensors[int(i)].buffer
        for graph in model.subgraphs
        for op in graph.operators
        for i in op.inputs
        if i >= 0 and codes[op.opcodeIndex] not in plain
    }
    halves: dict[int, int] = {}
    saved = 0
    for graph in model.subgraphs:
        widened = []
        for index, tensor in enumerate(list(graph.tensors)):
            data = model.buffers[tensor.buffer].data
            wide = tensor.type == schema.TensorType.FLOAT32 and tensor.buffer not in others
            if not wide or data is None or len(data) < least:
                continue
            values = np.asarray(data, np.uint8).view(np.float32)
            with np.errstate(over="ignore"):  # not held: told by the difference
                half = values.astype(np.float16)
            if np.abs(half - values).max() > 1e-3 * np.abs(values).max():
                continue
            if tensor.buffer not in halves:
                halves[tensor.buffer] = len(model.buffers)
                buffer = schema.BufferT()
                buffer.data = half.view(np.uint8)
                model.buffers.append(buffer)
                saved += half.nbytes
            stored = copy.copy(tensor)
            stored.type, stored.buffer = schema.TensorType.FLOAT16, halves[tensor.buffer]
            stored.name = tensor.name + b"_half"
            widen = schema.OperatorT()
            widen.opcodeIndex = _dequantize(model, schema)
            widen.inputs, widen.outputs = [len(graph.tensors)], [index]
            tensor.buffer = 0
            graph.tensors.append(stored)
            widened.append(widen)
        graph.operators = [*widened, *graph.operators]
    for old in halves:
        model.buffers[old].data = None
    return {"constants": len(halves), "bytes_saved": saved}


def _dequantize(model: Any, schema: Any) -> int:
    """Return the index of DEQUANTIZE of float16 (version 3) among the operator codes."""
    wanted = schema.BuiltinOperator.DEQUANTIZE
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == wanted and code.version >= 3:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = wanted
    code.version = 3
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
