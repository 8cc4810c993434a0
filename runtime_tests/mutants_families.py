"""Damage to int8 files, to files of two lengths and classifiers, and to fp16 files with a step.

Each format says how its constants and its functions' graphs are reached (:class:`Reach`);
what is done to them is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mutants_coreml
import mutants_onnx
import mutants_tflite
import numpy as np
import onnx
from mutants import Change, Mutant
from onnx import helper, numpy_helper

from flowexport.targets.coreml import package

SHORT, LONG, STEP = "forward_16", "forward_29", "step"
STATES = ("next_layer0_k_mean", "next_layer0_q_mean")
"""Two of a step's state outputs that have one shape."""

Values = Callable[[np.ndarray], np.ndarray]


def _double(values: np.ndarray) -> np.ndarray:
    return values * np.asarray(2, values.dtype)


def _next(values: np.ndarray) -> np.ndarray:
    return values + np.asarray(1, values.dtype)


def _negate_row(values: np.ndarray) -> np.ndarray:
    result = values.copy()
    result[1] = -result[1]
    return result


def _grow(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32) * 1.01).astype(values.dtype)


@dataclass(frozen=True)
class Reach:
    """How a format's files are changed; every callable takes the artifact's path last.

    Attributes:
        weight: changes the stored values of one quantised or half matrix of a function.
        scale: changes that matrix's scales.
        zero_point: changes the zero point of one activation; None where there is none.
        exchange: puts the graph of each length under the other's name.
        swap: exchanges two outputs of a function.
        keep: makes a step give back its first state as it came.
        epsilon: makes a function's small constants larger by what they are times a thousand.
    """

    weight: Callable[[str, Values, Path], None]
    scale: Callable[[str, Values, Path], None]
    zero_point: Callable[[str, Path], None] | None
    exchange: Change
    swap: Callable[[str, tuple[str, str], Path], None]
    keep: Change
    epsilon: Callable[[str, Path], None]


# ONNX: a function is a file.


def _file(function: str, path: Path) -> Path:
    beside = path.with_name(f"{path.stem}.{function}{path.suffix}")
    return beside if beside.exists() else path


def _onnx_edit(function: str, change: Callable[[Any], None], path: Path) -> None:
    mutants_onnx.edit(change, _file(function, path))


def _onnx_tensor(
    fits: Callable[[Any, Any], str | None], function: str, how: Values, path: Path
) -> None:
    def change(model: Any) -> None:
        held = {t.name: t for t in model.graph.initializer}
        names = (fits(node, held) for node in model.graph.node)
        name = next(n for n in names if n is not None)
        values = how(numpy_helper.to_array(held[name]))
        held[name].CopyFrom(numpy_helper.from_array(values, name))

    _onnx_edit(function, change, path)


def _onnx_matrix(node: Any, held: Any) -> str | None:
    """Return the matrix that a node widens from int8, or multiplies with in half or float32."""
    for name in node.input:
        tensor = held.get(name)
        if tensor is None or len(tensor.dims) != 2 or min(tensor.dims) < 2:
            continue
        if node.op_type in ("DequantizeLinear", "MatMul", "MatMulInteger", "Gemm", "Cast"):
            return str(name)
    return None


def _onnx_weight_input(place: int, node: Any, held: Any) -> str | None:
    if node.op_type != "DequantizeLinear" or node.input[0] not in held:
        return None
    return str(node.input[place])


def _onnx_activation(node: Any, held: Any) -> str | None:
    return str(node.input[2]) if node.op_type == "QuantizeLinear" else None


def _onnx_exchange(path: Path) -> None:
    short = _file(SHORT, path)
    one, other = path.read_bytes(), short.read_bytes()
    path.write_bytes(other)
    short.write_bytes(one)


def _onnx_swap(names: tuple[str, str], model: Any) -> None:
    other = dict(zip(names, reversed(names), strict=True))
    for node in model.graph.node:
        node.output[:] = [other.get(o, o) for o in node.output]
        node.input[:] = [other.get(i, i) for i in node.input]


def _onnx_keep(model: Any) -> None:
    output = STATES[0]
    for node in model.graph.node:
        node.output[:] = ["unread" if o == output else o for o in node.output]
        node.input[:] = ["unread" if i == output else i for i in node.input]
    model.graph.node.append(helper.make_node("Identity", [output.removeprefix("next_")], [output]))


def _onnx_epsilon(model: Any) -> None:
    changed = 0
    for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f *= 1000
                changed += 1
            if not attribute.HasField("t"):
                continue
            values = numpy_helper.to_array(attribute.t)
            if values.size == 1 and values.dtype.kind == "f" and 0 < abs(values.item()) < 1e-4:
                attribute.t.CopyFrom(numpy_helper.from_array(_grown(values), attribute.t.name))
                changed += 1
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size == 1 and values.dtype.kind == "f" and 0 < abs(values.item()) < 1e-4:
            tensor.CopyFrom(numpy_helper.from_array(_grown(values), tensor.name))
            changed += 1
    assert changed, "no small constant"


def _grown(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.astype(np.float32) * 1000).astype(values.dtype)


ONNX = Reach(
    weight=partial(_onnx_tensor, _onnx_matrix),
    scale=partial(_onnx_tensor, partial(_onnx_weight_input, 1)),
    zero_point=lambda function, path: _onnx_tensor(_onnx_activation, function, _next, path),
    exchange=_onnx_exchange,
    swap=lambda function, names, path: _onnx_edit(function, partial(_onnx_swap, names), path),
    keep=partial(_onnx_edit, STEP, _onnx_keep),
    epsilon=lambda function, path: _onnx_edit(function, _onnx_epsilon, path),
)


# TFLite: a function is a signature with its graph.


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
                    tensor.quantization.zeroPoint = _next(point)
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


# Core ML: a function of the program.


def _block(spec: Any, function: str) -> Any:
    functions = spec.mlProgram.functions
    chosen = functions[function if function in functions else "main"]
    return chosen.block_specializations[chosen.opset]


def _coreml_blob(part: str, function: str, how: Values, path: Path) -> None:
    """Change a matrix's stored values, or its scales; the blob may serve other functions too."""

    def change(spec: Any) -> None:
        content = bytearray((path / package.WEIGHTS_FILE).read_bytes())
        for op in _block(spec, function).operations:
            named = "quantized_data" in op.attributes
            value = op.attributes[part if named else "val"] if named or op.type == "const" else None
            if value is None or value.WhichOneof("value") != "blobFileValue":
                continue
            shape = mutants_coreml.shape_of(op.attributes["quantized_data" if named else "val"])
            if len(shape) != 2:
                continue
            dtype = {10: np.float16, 11: np.float32, 21: np.int8}[value.type.tensorType.dataType]
            size = int(np.prod(mutants_coreml.shape_of(value))) * np.dtype(dtype).itemsize
            record = content[value.blobFileValue.offset :][: mutants_coreml.RECORD]
            start = int(np.frombuffer(record[16:24], np.uint64)[0])
            values = np.frombuffer(bytes(content[start : start + size]), dtype)
            values = how(values.reshape(mutants_coreml.shape_of(value)))
            content[start : start + size] = values.tobytes()
            (path / package.WEIGHTS_FILE).write_bytes(bytes(content))
            return
        raise AssertionError("no matrix in few bits")

    mutants_coreml.edit(change, path)


def _coreml_exchange(path: Path) -> None:
    def change(spec: Any) -> None:
        functions = spec.mlProgram.functions
        one, other = type(functions[SHORT])(), type(functions[SHORT])()
        one.CopyFrom(functions[SHORT])
        other.CopyFrom(functions[LONG])
        functions[SHORT].CopyFrom(other)
        functions[LONG].CopyFrom(one)

    mutants_coreml.edit(change, path)


def _coreml_swap(function: str, names: tuple[str, str], path: Path) -> None:
    def change(spec: Any) -> None:
        other = dict(zip(names, reversed(names), strict=True))
        for op in _block(spec, function).operations:
            bindings = [b for argument in op.inputs.values() for b in argument.arguments]
            for named in (*op.outputs, *(b for b in bindings if b.name)):
                named.name = other.get(named.name, named.name)

    mutants_coreml.edit(change, path)


def _coreml_keep(path: Path) -> None:
    def change(spec: Any) -> None:
        block = _block(spec, STEP)
        writer = next(o for o in block.operations if o.outputs[0].name == STATES[0])
        kept = type(writer.outputs[0])()
        kept.CopyFrom(writer.outputs[0])
        writer.Clear()
        writer.type = "identity"
        writer.inputs["x"].arguments.add(name=STATES[0].removeprefix("next_"))
        writer.outputs.add().CopyFrom(kept)

    mutants_coreml.edit(change, path)


def _coreml_epsilon(function: str, path: Path) -> None:
    def change(spec: Any) -> None:
        changed = 0
        for op in _block(spec, function).operations:
            if op.type != "const":
                continue
            value = op.attributes["val"]
            tensor, kind = value.immediateValue.tensor, value.type.tensorType.dataType
            if kind == package.MIL_FLOAT16 and len(tensor.bytes.values) == 2:
                half = np.frombuffer(tensor.bytes.values, np.float16)
                if 0 < abs(half[0]) < 1e-4:
                    tensor.bytes.values = _grown(half).tobytes()
                    changed += 1
            elif len(tensor.floats.values) == 1 and 0 < abs(tensor.floats.values[0]) < 1e-4:
                tensor.floats.values[0] *= 1000
                changed += 1
        assert changed, "no small constant"

    mutants_coreml.edit(change, path)


def _classes(function: str, path: Path) -> None:
    """Rotate the class names of a classifier's function."""

    def change(spec: Any) -> None:
        op = next(o for o in _block(spec, function).operations if o.type == "classify")
        texts = op.inputs["classes"].arguments[0].value.immediateValue.list.values
        names = [t.immediateValue.tensor.strings.values[0] for t in texts]
        for text, name in zip(texts, names[1:] + names[:1], strict=True):
            text.immediateValue.tensor.strings.values[0] = name

    mutants_coreml.edit(change, path)


COREML = Reach(
    weight=partial(_coreml_blob, "quantized_data"),
    scale=partial(_coreml_blob, "scale"),
    zero_point=None,
    exchange=_coreml_exchange,
    swap=_coreml_swap,
    keep=_coreml_keep,
    epsilon=_coreml_epsilon,
)
REACH = {"onnx": ONNX, "tflite": TFLITE, "coreml": COREML}


def _foreign_metadata(path: Path) -> None:
    """Let the file of the shorter length speak of another model."""

    def change(model: Any) -> None:
        props = {p.key: p.value for p in model.metadata_props}
        model.ClearField("metadata_props")
        helper.set_model_props(model, {**props, "model": "other"})

    _onnx_edit(SHORT, change, path)


def _onnx_copy(path: Path) -> None:
    onnx.save(onnx.load(path), _file(SHORT, path))


def mutants_of() -> list[Mutant]:
    """Return the mutants of both families."""
    found = []
    for target, reach in REACH.items():

        def add(
            family: str,
            kind: str,
            name: str,
            change: Change,
            loads: bool = True,
            *,
            target: str = target,
        ) -> None:
            # ONNX's functions are files beside the one that is damaged.
            whole = target == "onnx"
            inside = partial(_inside, change) if whole else change
            found.append(Mutant(target, kind, name, inside, loads, whole, family))

        if reach.zero_point is not None:
            add("int8", "int8 zero point", "shifted by one", partial(reach.zero_point, "forward"))
        add("int8", "int8 scale", "doubled", partial(reach.scale, "forward", _double))
        change = partial(reach.weight, "forward", _negate_row)
        add("int8", "int8 weight", "a row negated", change)
        for function in (LONG, SHORT):
            at = f"of {function}"
            change = partial(reach.weight, function, _negate_row)
            add("lengths", "a function's weight", f"a row negated, {at}", change)
            change = partial(reach.swap, function, ("logits", "other"))
            add("lengths", "outputs swapped", at, change)
        add("lengths", "functions exchanged", "both lengths", reach.exchange, loads=False)
        for function in ("forward", STEP):
            at = f"of {function}"
            add("stream", "fp16 layer", f"by 1.01, {at}", partial(reach.weight, function, _grow))
            add("stream", "ε changed", f"by 1000, {at}", partial(reach.epsilon, function))
        add("stream", "step's state", "two outputs swapped", partial(reach.swap, STEP, STATES))
        add("stream", "step's state", "not updated", reach.keep)
        if target == "coreml":
            for function in (LONG, SHORT):
                add(
                    "lengths",
                    "labels shifted",
                    f"classes of {function}",
                    partial(_classes, function),
                )
        if target == "onnx":
            add(
                "lengths",
                "metadata of another model",
                "in the shorter length's file",
                _foreign_metadata,
            )
            add("lengths", "functions exchanged", "a copy of the longer", _onnx_copy, loads=False)
    return found


def _inside(change: Change, bundle: Path) -> None:
    (path,) = [p for p in (bundle / "onnx").glob("*.onnx") if p.name.count(".") == 1]
    change(path)
