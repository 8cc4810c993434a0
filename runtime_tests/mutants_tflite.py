"""Damage to a finished TFLite file, by the schema's objects; its own files stay behind it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import numpy as np
from mutants import WEIGHT_DAMAGES, Damage, Mutant

from flowexport.targets.tflite import flatbuffer, metadata

FORMAT = "tflite"
Edit = Callable[[Any], None]
FLOAT32, FLOAT16, INT8 = 0, 1, 9  # TensorType


def edit(change: Edit, path: Path) -> None:
    model = flatbuffer.read_model(path)
    header, labels = metadata.read_files(path)
    change(model)
    flatbuffer.write_model(model, path, {})
    metadata.append_files(path, header, labels)


def _describe(change: Callable[[dict[str, Any], list[str]], list[str]], path: Path) -> None:
    """Change the files behind the flatbuffer; ``change`` returns the labels."""
    header, labels = metadata.read_files(path)
    with zipfile.ZipFile(path) as archive:
        start = min(i.header_offset for i in archive.infolist())
    labels = change(header, labels)
    path.write_bytes(path.read_bytes()[:start])
    metadata.append_files(path, header, labels)


def _graph(model: Any) -> Any:
    return model.subgraphs[0]


def _constant(model: Any, index: int) -> np.ndarray | None:
    """Return a float constant's values, or None for any other tensor."""
    tensor = _graph(model).tensors[index]
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data) or tensor.type != FLOAT32:
        return None
    shape = () if tensor.shape is None else tuple(int(d) for d in tensor.shape)
    return np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.float32).reshape(shape)


def _set(model: Any, index: int, values: np.ndarray) -> None:
    """Give one tensor a buffer of its own with these values."""
    from ai_edge_litert import schema_py_generated as schema

    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
    _graph(model).tensors[index].buffer = len(model.buffers)
    model.buffers.append(buffer)


def weights(model: Any) -> dict[str, np.ndarray]:
    """Return the float constants by tensor number, in the order in which operators read them."""
    found = {}
    for operator in _graph(model).operators:
        for index in operator.inputs:
            values = _constant(model, int(index)) if index >= 0 else None
            if values is not None:
                found.setdefault(str(index), values)
    return found


def _role(model: Any, role: str) -> int:
    """Return the number of the tensor that plays a role; norms are folded or lone factors here."""
    tensors = weights(model)
    if role == "norm":
        tensors = {k: v for k, v in tensors.items() if v.ndim == 1 and v.size > 8}
        return int(next(iter(tensors)))
    biases = {k: v for k, v in tensors.items() if v.ndim == 1}
    if role == "bias":
        return int(list(biases)[len(biases) // 2])
    matrices = [k for k, v in tensors.items() if v.ndim == 2 and min(v.shape) > 1]
    return int(matrices[{"first": 0, "middle": len(matrices) // 3, "last": -1}[role]])


def damage_layer(path: Path, layer: np.ndarray, damage: Damage) -> None:
    """Damage the tensor that holds a layer's matrix, in either order of its axes."""

    def change(model: Any) -> None:
        tensors = weights(model)
        name = mutants.find_tensor(tensors, layer)
        _set(model, int(name), damage(tensors[name]).astype(np.float32))

    edit(change, path)


def _weight(role: str, damage: Damage, model: Any) -> None:
    index = _role(model, role)
    values = _constant(model, index)
    assert values is not None
    _set(model, index, damage(values).astype(np.float32))


def operator_code(model: Any, name: str) -> int:
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, name)
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _operators(model: Any, name: str) -> list[Any]:
    code = operator_code(model, name)
    found = [o for o in _graph(model).operators if o.opcodeIndex == code]
    assert found, f"no {name}"
    return found


def _stored(kind: str, model: Any) -> None:
    """Store the attention's matrix in another type behind DEQUANTIZE."""
    from ai_edge_litert import schema_py_generated as schema

    index = _role(model, "middle")
    graph = _graph(model)
    values = _constant(model, index)
    assert values is not None
    short = schema.TensorT()
    short.name, short.shape = b"short", np.array(values.shape, np.int32)
    short.type = FLOAT16 if kind == "fp16" else INT8
    graph.tensors.append(short)
    number = len(graph.tensors) - 1
    if kind == "fp16":
        _set(model, number, values.astype(np.float16))
    else:
        quantised, scale = mutants.int8_of(values)
        short.quantization = schema.QuantizationParametersT()
        short.quantization.scale = np.array([scale], np.float32)
        short.quantization.zeroPoint = np.array([0], np.int64)
        _set(model, number, quantised)
    widened = schema.TensorT()
    widened.name, widened.shape, widened.type = b"widened", short.shape, FLOAT32
    widened.buffer = 0
    graph.tensors.append(widened)
    operator = schema.OperatorT()
    operator.opcodeIndex = operator_code(model, "DEQUANTIZE")
    operator.inputs = np.array([number], np.int32)
    operator.outputs = np.array([number + 1], np.int32)
    for reader in graph.operators:
        reader.inputs = np.array([number + 1 if i == index else i for i in reader.inputs], np.int32)
    graph.operators.insert(0, operator)


def _scalar(near: float, value: float, model: Any, *, count: int | None = None) -> None:
    """Change constants of one value, the first ``count`` of them."""
    held = weights(model)
    found = [
        int(k)
        for k, v in held.items()
        if v.size == 1 and abs(float(v.reshape(())) - near) <= 1e-6 * abs(near)
    ]
    assert found, f"no constant of {near}"
    for index in found[:count]:
        values = _constant(model, index)
        assert values is not None
        _set(model, index, np.full(values.shape, value, np.float32))


def _replace(old: str, new: str, model: Any, *, place: int = 0) -> None:
    operator = _operators(model, old)[place]
    operator.opcodeIndex = operator_code(model, new)
    operator.builtinOptions, operator.builtinOptionsType = None, 0


def _clamp(new: str, model: Any) -> None:
    """Put another operator in place of the first clamp, which may be part of an addition."""
    from ai_edge_litert import schema_py_generated as schema

    clamp, graph = schema.ActivationFunctionType.RELU_N1_TO_1, _graph(model)
    options = [getattr(o.builtinOptions, "fusedActivationFunction", 0) for o in graph.operators]
    if clamp not in options:
        _replace("RELU_N1_TO_1", new, model)
        return
    place = options.index(clamp)
    result = graph.operators[place].outputs[0]
    unclamped = schema.TensorT()
    unclamped.name, unclamped.shape = b"unclamped", graph.tensors[result].shape
    unclamped.type, unclamped.buffer = FLOAT32, 0
    graph.tensors.append(unclamped)
    graph.operators[place].builtinOptions.fusedActivationFunction = 0
    graph.operators[place].outputs = np.array([len(graph.tensors) - 1], np.int32)
    operator = schema.OperatorT()
    operator.opcodeIndex = operator_code(model, new)
    operator.inputs = graph.operators[place].outputs
    operator.outputs = np.array([result], np.int32)
    graph.operators.insert(place + 1, operator)


def _adjoint(model: Any) -> None:
    """Transpose the first attention's context, a square matrix a head."""
    for operator in _operators(model, "BATCH_MATMUL"):
        first = _graph(model).tensors[operator.inputs[0]].shape
        if first[-1] == first[-2]:
            operator.builtinOptions.adjX = not operator.builtinOptions.adjX
            return
    raise AssertionError("no square factor")


def _exchange(model: Any) -> None:
    """Let the first attention's queries and keys change places."""
    one, other = _operators(model, "LOGISTIC")[:2]
    one.inputs, other.inputs = other.inputs, one.inputs


def _gelu(model: Any) -> None:
    _operators(model, "GELU")[0].builtinOptions.approximate = True


def _beta(model: Any) -> None:
    _operators(model, "SOFTMAX")[-1].builtinOptions.beta = 1.01


def _swap_inputs(name: str, model: Any) -> None:
    operator = _operators(model, name)[0]
    operator.inputs = np.array([operator.inputs[1], operator.inputs[0]], np.int32)


def _rewire(model: Any) -> None:
    """Let the first residual add its own branch twice."""
    graph = _graph(model)
    shapes = [list(t.shape) if t.shape is not None else [] for t in graph.tensors]
    adds = [
        o
        for o in _operators(model, "ADD")
        if all(_constant(model, int(i)) is None for i in o.inputs)
        and np.prod(shapes[o.inputs[0]]) == np.prod(shapes[o.inputs[1]])
    ]
    same = [i for i in adds[0].inputs if shapes[i] == shapes[adds[0].outputs[0]]]
    adds[0].inputs = np.array([same[0], same[0]], np.int32)


def _swap_outputs(model: Any) -> None:
    outputs = model.signatureDefs[0].outputs
    first, second = outputs[0].tensorIndex, outputs[1].tensorIndex
    outputs[0].tensorIndex, outputs[1].tensorIndex = second, first


def mutants_of() -> list[Mutant]:
    """Return the format's mutants."""
    found = [
        Mutant(FORMAT, kind, name, partial(edit, partial(_weight, role, damage)))
        for name, (kind, role, damage) in WEIGHT_DAMAGES.items()
    ]

    def add(kind: str, name: str, change: Edit) -> None:
        found.append(Mutant(FORMAT, kind, name, partial(edit, change)))

    def tell(kind: str, name: str, change: Any) -> None:
        found.append(Mutant(FORMAT, kind, name, partial(_describe, change)))

    for kind in ("fp16", "int8"):
        add(f"layer made {kind}", f"stored as {kind}", partial(_stored, kind))
    for value in (1e-3, 1e-4, 0.0):
        add("ε changed", f"a norm's, 1e-5 to {value:g}", partial(_scalar, 1e-5, value))
    for value in (1e-2, 1e-4, 0.0):
        add("ε changed", f"the attentions', 1e-6 to {value:g}", partial(_scalar, 1e-6, value))
    for new in ("RELU6", "RELU", "TANH"):
        change = partial(_clamp, new)
        add("clamp changed", f"by {new}", change)
    add("axis changed", "rows and columns of the context", _adjoint)
    add("axis changed", "queries and keys exchanged", _exchange)
    add("operator replaced", "LOGISTIC by TANH", partial(_replace, "LOGISTIC", "TANH"))
    add("operator replaced", "EXP by LOGISTIC", partial(_replace, "EXP", "LOGISTIC"))
    add("operator replaced", "DIV by MUL", partial(_replace, "DIV", "MUL"))
    add("operator replaced", "RSQRT by SQRT", partial(_replace, "RSQRT", "SQRT"))
    add("operator replaced", "ReLU by ReLU6", partial(_replace, "RELU", "RELU6"))
    add("operator replaced", "GELU by its tanh approximation", _gelu)
    add("operator replaced", "softmax with β = 1.01", _beta)
    add("operator replaced", "a residual from the wrong branch", _rewire)
    add("operator replaced", "a difference the other way", partial(_swap_inputs, "SUB"))
    add("outputs swapped", "names", _swap_outputs)
    tell("labels shifted", "by one", lambda header, labels: labels[1:] + labels[:1])
    tell("labels shifted", "two swapped", lambda h, labels: [labels[1], labels[0], *labels[2:]])
    tell("labels shifted", "one lost", lambda header, labels: labels[:-1])
    for key, value in (("model", "other"), ("recipe_sha256", "0" * 64), ("precision", "fp16")):

        def change(
            header: dict[str, Any], labels: list[str], key: str = key, value: str = value
        ) -> list[str]:
            header[key] = value
            return labels

        tell("metadata of another model", key, change)

    def rescaled(header: dict[str, Any], labels: list[str]) -> list[str]:
        header["preprocessing"] = {"scale": 1.0}
        return labels

    tell("metadata of another model", "preprocessing", rescaled)
    return found
