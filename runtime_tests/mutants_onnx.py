"""Damage to a finished ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import onnx
from mutants import WEIGHT_DAMAGES, Damage, Mutant
from onnx import helper, numpy_helper

FORMAT = "onnx"
Edit = Callable[[Any], None]


def weights(model: Any) -> dict[str, np.ndarray]:
    """Return the float initializers in the order in which nodes read them."""
    held = {t.name: t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    order = dict.fromkeys(i for n in model.graph.node for i in n.input if i in held)
    return {name: numpy_helper.to_array(held[name]) for name in order}


def _initializer(model: Any, name: str) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def edit(change: Edit, path: Path) -> None:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def damage_layer(path: Path, layer: np.ndarray, damage: Damage) -> None:
    """Damage the tensor that holds a layer's matrix, in either order of its axes."""

    def change(model: Any) -> None:
        tensors = weights(model)
        name = mutants.find_tensor(tensors, layer)
        tensor = _initializer(model, name)
        values = damage(tensors[name]).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    edit(change, path)


def _weight(role: str, damage: Damage, model: Any) -> None:
    tensors = weights(model)
    name = mutants.roles(tensors)[role]
    tensor = _initializer(model, name)
    tensor.CopyFrom(numpy_helper.from_array(damage(tensors[name]).astype(np.float32), name))


def _stored(kind: str, model: Any) -> None:
    """Store the attention's matrix in another type behind Cast or DequantizeLinear."""
    tensors = weights(model)
    name = mutants.roles(tensors)["middle"]
    values = tensors[name]
    tensor, short = _initializer(model, name), f"{name}_short"
    readers = [n for n in model.graph.node if name in n.input]
    if kind == "fp16":
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), short))
        node = helper.make_node("Cast", [short], [name], name=short, to=onnx.TensorProto.FLOAT)
    else:
        quantised, scale = mutants.int8_of(values)
        tensor.CopyFrom(numpy_helper.from_array(quantised, short))
        model.graph.initializer.append(numpy_helper.from_array(np.array(scale), f"{short}_scale"))
        node = helper.make_node("DequantizeLinear", [short, f"{short}_scale"], [name], name=short)
    model.graph.node.insert(list(model.graph.node).index(readers[0]), node)


def _nodes(model: Any, op_type: str) -> list[Any]:
    """Return the operators of one type, those of the attention functions first."""
    inside = [n for f in model.functions for n in f.node if n.op_type == op_type]
    return inside + [n for n in model.graph.node if n.op_type == op_type]


def _main(model: Any, op_type: str) -> Any:
    return next(n for n in model.graph.node if n.op_type == op_type)


def _attribute(node: Any, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _norm_epsilon(value: float, model: Any) -> None:
    _attribute(_main(model, "LayerNormalization"), "epsilon", value)


def _constants(model: Any, near: float) -> list[Any]:
    """Return the functions' scalar constants of one value."""
    found = []
    for node in _nodes(model, "Constant"):
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is None or value.data_type != onnx.TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(value)
        if array.size == 1 and abs(float(array.reshape(())) - near) <= 1e-6 * abs(near):
            found.append(value)
    assert found, f"no constant of {near}"
    return found


def _attention_constant(near: float, value: float, model: Any, *, count: int | None = 1) -> None:
    for tensor in _constants(model, near)[:count]:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            numpy_helper.from_array(np.full(array.shape, value, np.float32), tensor.name)
        )


def _operator(old: str, new: str, model: Any, *, main: bool = False, **attributes: Any) -> None:
    node = _main(model, old) if main else _nodes(model, old)[0]
    node.op_type = new
    del node.attribute[:]
    for name, value in attributes.items():
        node.attribute.append(helper.make_attribute(name, value))


def _context(model: Any) -> None:
    """Transpose the first attention's context, a square matrix a head."""
    function = model.functions[0]
    product = [n for n in function.node if n.op_type == "MatMul"][-1]
    place = list(function.node).index(product)
    turn = helper.make_node("Transpose", [product.input[0]], ["turned"], perm=[0, 1, 3, 2])
    product.input[0] = "turned"
    function.node.insert(place, turn)


def _exchange(model: Any) -> None:
    node = next(n for n in model.graph.node if n.domain)
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _no_clamp(model: Any) -> None:
    node = _nodes(model, "Clip")[0]
    node.op_type = "Identity"
    del node.input[1:]


def _permutation(model: Any) -> None:
    node = [n for n in model.functions[-1].node if n.op_type == "Transpose"][-1]
    _attribute(node, "perm", [0, 1, 3, 2])


def _swap_outputs(model: Any) -> None:
    first, second = (o.name for o in model.graph.output)
    names = {first: second, second: first}
    for node in model.graph.node:
        node.output[:] = [names.get(o, o) for o in node.output]


def _props(change: Callable[[dict[str, str]], None], model: Any) -> None:
    props = {p.key: p.value for p in model.metadata_props}
    change(props)
    model.ClearField("metadata_props")
    helper.set_model_props(model, props)


def _labels(change: Callable[[list[str]], list[str]], props: dict[str, str]) -> None:
    props["labels"] = json.dumps(change(json.loads(props["labels"])))


def _no_function(model: Any) -> None:
    """Replace the attention nodes by their bodies: equal numbers, no fusion left."""
    import onnx.inliner

    model.CopyFrom(onnx.inliner.inline_local_functions(model))


def _constant_output(model: Any) -> None:
    """Let the head ignore its input."""
    node = next(n for n in reversed(model.graph.node) if n.op_type in ("Gemm", "MatMul"))
    name = node.input[0]
    zero = numpy_helper.from_array(np.array(0, np.float32), "nothing")
    model.graph.initializer.append(zero)
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, helper.make_node("Mul", [name, "nothing"], ["ignored"]))
    node.input[0] = "ignored"


def mutants_of() -> list[Mutant]:
    """Return the format's mutants."""
    found = [
        Mutant(FORMAT, kind, name, partial(edit, partial(_weight, role, damage)))
        for name, (kind, role, damage) in WEIGHT_DAMAGES.items()
    ]

    def add(kind: str, name: str, change: Edit) -> None:
        found.append(Mutant(FORMAT, kind, name, partial(edit, change)))

    for kind in ("fp16", "int8"):
        add(f"layer made {kind}", f"stored as {kind}", partial(_stored, kind))
    for value in (1e-3, 1e-4, 0.0):
        add("ε changed", f"a norm's, 1e-5 to {value:g}", partial(_norm_epsilon, value))
    for value in (1e-2, 1e-4, 0.0):
        change = partial(_attention_constant, 1e-6, value, count=None)
        add("ε changed", f"the attentions', 1e-6 to {value:g}", change)
    add("clamp changed", "lower bound to 0.9", partial(_attention_constant, -1.0, 0.9))
    add("clamp changed", "lower bound to -0.9", partial(_attention_constant, -1.0, -0.9))
    add("clamp changed", "upper bound to 2", partial(_attention_constant, 1.0, 2.0))
    add("clamp changed", "no clamp", _no_clamp)
    add("axis changed", "softmax of the head", lambda m: _attribute(_main(m, "Softmax"), "axis", 0))
    add("axis changed", "rows and columns of the context", _context)
    add("axis changed", "queries and keys exchanged", _exchange)
    add("axis changed", "the attention's last transpose", _permutation)
    add("operator replaced", "Sigmoid by HardSigmoid", partial(_operator, "Sigmoid", "HardSigmoid"))
    add("operator replaced", "Exp by Softplus", partial(_operator, "Exp", "Softplus"))
    add("operator replaced", "Div by Mul", partial(_operator, "Div", "Mul"))
    add("operator replaced", "Add by Sub", partial(_operator, "Add", "Sub", main=True))
    gelu = partial(_operator, "Gelu", "Gelu", main=True, approximate="tanh")
    add("operator replaced", "GELU by its tanh approximation", gelu)
    add("operator replaced", "ReLU by leaky ReLU", partial(_operator, "Relu", "LeakyRelu"))
    add("operator replaced", "attention nodes by plain operators", _no_function)
    add("operator replaced", "a head that ignores its input", _constant_output)
    add("outputs swapped", "names", _swap_outputs)
    shift = partial(_props, partial(_labels, lambda v: v[1:] + v[:1]))
    add("labels shifted", "by one", shift)
    swap = partial(_props, partial(_labels, lambda v: [v[1], v[0], *v[2:]]))
    add("labels shifted", "two swapped", swap)
    add("labels shifted", "one lost", partial(_props, partial(_labels, lambda v: v[:-1])))
    for key, value in (("model", "other"), ("recipe_sha256", "0" * 64), ("precision", "fp16")):
        change = partial(_props, partial(lambda k, v, p: p.update({k: v}), key, value))
        add("metadata of another model", key, change)
    change = partial(_props, lambda p: p.update(preprocessing=json.dumps({"scale": 1.0})))
    add("metadata of another model", "preprocessing", change)
    add("metadata of another model", "none", partial(_props, dict.clear))
    return found
