"""ONNX: a function is a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutants_onnx
import onnx
from mutants_reach import SHORT, STATES, STEP, Reach, Values, following, thousandfold
from onnx import helper, numpy_helper


def file_of(function: str, path: Path) -> Path:
    beside = path.with_name(f"{path.stem}.{function}{path.suffix}")
    return beside if beside.exists() else path


def edit(function: str, change: Callable[[Any], None], path: Path) -> None:
    mutants_onnx.edit(change, file_of(function, path))


def _onnx_tensor(
    fits: Callable[[Any, Any], str | None], function: str, how: Values, path: Path
) -> None:
    def change(model: Any) -> None:
        held = {t.name: t for t in model.graph.initializer}
        names = (fits(node, held) for node in model.graph.node)
        name = next(n for n in names if n is not None)
        values = how(numpy_helper.to_array(held[name]))
        held[name].CopyFrom(numpy_helper.from_array(values, name))

    edit(function, change, path)


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
    short = file_of(SHORT, path)
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
                attribute.t.CopyFrom(
                    numpy_helper.from_array(thousandfold(values), attribute.t.name)
                )
                changed += 1
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size == 1 and values.dtype.kind == "f" and 0 < abs(values.item()) < 1e-4:
            tensor.CopyFrom(numpy_helper.from_array(thousandfold(values), tensor.name))
            changed += 1
    assert changed, "no small constant"


def foreign_metadata(path: Path) -> None:
    """Let the file of the shorter length speak of another model."""

    def change(model: Any) -> None:
        props = {p.key: p.value for p in model.metadata_props}
        model.ClearField("metadata_props")
        helper.set_model_props(model, {**props, "model": "other"})

    edit(SHORT, change, path)


def copy_longer(path: Path) -> None:
    onnx.save(onnx.load(path), file_of(SHORT, path))


ONNX = Reach(
    weight=partial(_onnx_tensor, _onnx_matrix),
    scale=partial(_onnx_tensor, partial(_onnx_weight_input, 1)),
    zero_point=lambda function, path: _onnx_tensor(_onnx_activation, function, following, path),
    exchange=_onnx_exchange,
    swap=lambda function, names, path: edit(function, partial(_onnx_swap, names), path),
    keep=partial(edit, STEP, _onnx_keep),
    epsilon=lambda function, path: edit(function, _onnx_epsilon, path),
)
