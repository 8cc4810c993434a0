"""Core ML: a function of the program."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mutants_coreml
import numpy as np
from mutants import one, swap_rows
from mutants_reach import LONG, SHORT, STATES, STEP, Reach, Values, thousandfold

from flowexport.targets.coreml import package


def _block(spec: Any, function: str) -> Any:
    functions = spec.mlProgram.functions
    chosen = functions[function if function in functions else "main"]
    return chosen.block_specializations[chosen.opset]


def _coreml_blob(part: str, function: str, how: Values, path: Path) -> None:
    """Change a matrix's stored values, or its scales; the blob may serve other functions too."""

    def change(spec: Any) -> None:
        for op in _block(spec, function).operations:
            named = "quantized_data" in op.attributes
            value = op.attributes[part if named else "val"] if named or op.type == "const" else None
            if value is None or value.WhichOneof("value") != "blobFileValue":
                continue
            shape = mutants_coreml.shape_of(op.attributes["quantized_data" if named else "val"])
            if len(shape) == 2:
                dtype = {10: np.float16, 11: np.float32, 21: np.int8}[
                    value.type.tensorType.dataType
                ]
                _write(value, dtype, mutants_coreml.shape_of(value), how, path)
                return
        raise AssertionError("no matrix in few bits")

    mutants_coreml.edit(change, path)


def _write(value: Any, dtype: Any, shape: tuple[int, ...], how: Values, path: Path) -> None:
    """Change a blob's values in place."""
    content = bytearray((path / package.WEIGHTS_FILE).read_bytes())
    _, _, length, start = package.BLOB.unpack_from(content, value.blobFileValue.offset)
    values = np.frombuffer(bytes(content[start : start + length]), dtype).reshape(shape)
    content[start : start + length] = how(values).tobytes()
    (path / package.WEIGHTS_FILE).write_bytes(bytes(content))


def palette(part: str, how: Values, path: Path) -> None:
    """Change the second palette: its table of float16, or its indices, 4 bits each."""

    def change(spec: Any) -> None:
        operations = _block(spec, "forward").operations
        op = [o for o in operations if o.type == "constexpr_lut_to_dense"][1]
        value = op.attributes[{"table": "lut", "indices": "indices"}[part]]
        rows = op.outputs[0].type.tensorType.dimensions[0].constant.size
        table = part == "table"
        _write(value, np.float16 if table else np.uint8, (-1,) if table else (rows, -1), how, path)

    mutants_coreml.edit(change, path)


def _one_index(values: np.ndarray) -> np.ndarray:
    result = values.copy()
    result[3, 2] ^= 1  # the lowest bit: the entry beside
    return result


PALETTE: tuple[tuple[str, str, Values], ...] = (
    ("one entry by 1.1", "table", one(lambda v: float(v) * 1.1)),
    ("two entries swapped", "table", swap_rows),
    ("one index to the entry beside", "indices", _one_index),
    ("two rows swapped", "indices", swap_rows),
)
"""Name, part of a palette, and what is done to it."""


def _zero_point(function: str, path: Path) -> None:
    """Let one ``quantize`` and what reads it have a zero point of 1; coremltools leaves it out."""

    def change(spec: Any) -> None:
        from coremltools.converters.mil.backend.mil.helper import create_scalar_value

        operations = _block(spec, function).operations
        there = next(op for op in operations if op.type == "quantize")
        for op in operations:
            read = op.type == "dequantize" and op.inputs["input"].arguments[0].name
            if op is there or read == there.outputs[0].name:
                point = op.inputs["zero_point"].arguments.add()
                point.value.CopyFrom(create_scalar_value(np.int8(1)))

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
                    tensor.bytes.values = thousandfold(half).tobytes()
                    changed += 1
            elif len(tensor.floats.values) == 1 and 0 < abs(tensor.floats.values[0]) < 1e-4:
                tensor.floats.values[0] *= 1000
                changed += 1
        assert changed, "no small constant"

    mutants_coreml.edit(change, path)


def exchange_classes(function: str, path: Path) -> None:
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
    zero_point=_zero_point,
    exchange=_coreml_exchange,
    swap=_coreml_swap,
    keep=_coreml_keep,
    epsilon=_coreml_epsilon,
)
