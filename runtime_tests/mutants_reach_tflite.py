"""TFLite: a function is a signature with its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mutants_tflite
import numpy as np
from mutants_reach import LONG, SHORT, STATES, STEP, Reach, Values, following


def _graph(model: Any, function: str) -> Any:
    for signature in model.signatureDefs:
        if signature.signatureKey.decode() == function:
            return model.subgraphs[signature.subgraphIndex]
    return model.subgraphs[0]


def _signature(model: Any, function: str) -> Any:
    return next(s for s in model.signatureDefs if s.signatureKey.decode() == function)


NARROW = {mutants_tflite.FLOAT16: np.float16, mutants_tflite.INT8: np.int8}


def _tflite_matrix(model: Any, function: str) -> Any:
    """Return the first matrix in few bits that the function's operators read."""
    graph = _graph(model, function)
    for operator in graph.operators:
        for index in operator.inputs:
            tensor = graph.tensors[index]
            data = model.buffers[tensor.buffer].data
            if tensor.type in NARROW and data is not None and len(tensor.shape) == 2:
                return tensor
    raise AssertionError("no matrix in few bits")


def _tflite_weight(function: str, how: Values, path: Path) -> None:
    def change(model: Any) -> None:
        tensor = _tflite_matrix(model, function)
        old = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        values = how(old.view(NARROW[tensor.type]).reshape(tensor.shape))
        # A buffer of its own: the other functions keep the right one.
        buffer = type(model.buffers[0])()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        tensor.buffer = len(model.buffers)
        model.buffers.append(buffer)

    mutants_tflite.edit(change, path)


def _tflite_scale(function: str, how: Values, path: Path) -> None:
    def change(model: Any) -> None:
        quantisation = _tflite_matrix(model, function).quantization
        quantisation.scale = how(np.asarray(quantisation.scale, np.float32))

    mutants_tflite.edit(change, path)


def _tflite_zero_point(function: str, path: Path) -> None:
    def change(model: Any) -> None:
        graph = _graph(model, function)
        for operator in graph.operators:
            for index in operator.outputs:
                tensor = graph.tensors[index]
                if tensor.type == mutants_tflite.INT8:
                    point = np.asarray(tensor.quantization.zeroPoint, np.int64)
                    tensor.quantization.zeroPoint = following(point)
                    return
        raise AssertionError("no activation in int8")

    mutants_tflite.edit(change, path)


def _tflite_exchange(path: Path) -> None:
    def change(model: Any) -> None:
        one, other = _signature(model, SHORT), _signature(model, LONG)
        one.signatureKey, other.signatureKey = other.signatureKey, one.signatureKey

    mutants_tflite.edit(change, path)


def _tflite_swap(function: str, names: tuple[str, str], path: Path) -> None:
    def change(model: Any) -> None:
        found = {o.name.decode(): o for o in _signature(model, function).outputs}
        one, other = found[names[0]], found[names[1]]
        one.tensorIndex, other.tensorIndex = other.tensorIndex, one.tensorIndex

    mutants_tflite.edit(change, path)


def _tflite_keep(path: Path) -> None:
    def change(model: Any) -> None:
        signature, graph = _signature(model, STEP), _graph(model, STEP)
        output = next(o for o in signature.outputs if o.name.decode() == STATES[0])
        wanted = STATES[0].removeprefix("next_")
        given = next(i for i in signature.inputs if i.name.decode() == wanted)
        # 0 + the state: an output may not be an input's own tensor.
        writer = next(o for o in graph.operators if output.tensorIndex in o.outputs)
        code = mutants_tflite.operator_code(model, "MAXIMUM")
        writer.opcodeIndex, writer.builtinOptions, writer.builtinOptionsType = code, None, 0
        writer.inputs = np.array([given.tensorIndex, given.tensorIndex], np.int32)

    mutants_tflite.edit(change, path)


def _tflite_epsilon(function: str, path: Path) -> None:
    def change(model: Any) -> None:
        changed = 0
        for tensor in _graph(model, function).tensors:
            data = model.buffers[tensor.buffer].data
            if data is None or len(data) != 4 or tensor.type != mutants_tflite.FLOAT32:
                continue
            value = np.asarray(data, np.uint8).view(np.float32)
            if 0 < abs(value[0]) < 1e-4:
                buffer = type(model.buffers[0])()
                buffer.data = (value * np.float32(1000)).view(np.uint8)
                tensor.buffer = len(model.buffers)
                model.buffers.append(buffer)
                changed += 1
        assert changed, "no small constant"

    mutants_tflite.edit(change, path)


TFLITE = Reach(
    weight=_tflite_weight,
    scale=_tflite_scale,
    zero_point=_tflite_zero_point,
    exchange=_tflite_exchange,
    swap=_tflite_swap,
    keep=_tflite_keep,
    epsilon=_tflite_epsilon,
)
