"""Damage to a finished .mlpackage: its program (protobuf) and its weights (weight.bin)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import numpy as np
from mutants import WEIGHT_DAMAGES, Damage, Mutant

from flowexport.targets.coreml import package

FORMAT = "coreml"
Edit = Callable[[Any], None]
RECORD = 64
"""Bytes of the record that precedes a blob's data in weight.bin."""


def edit(change: Edit, path: Path) -> None:
    spec = package.read_spec(path)
    change(spec)
    (path / package.MODEL_FILE).write_bytes(spec.SerializeToString(deterministic=True))


def _block(spec: Any) -> Any:
    function = next(iter(spec.mlProgram.functions.values()))
    return function.block_specializations[function.opset]


def _operations(spec: Any, kind: str) -> list[Any]:
    found = [op for op in _block(spec).operations if op.type == kind]
    assert found, f"no {kind}"
    return found


def _constants(spec: Any) -> dict[str, Any]:
    return {op.outputs[0].name: op for op in _block(spec).operations if op.type == "const"}


def _value(spec: Any, operation: Any, argument: str) -> Any:
    """Return the value message of an operator's constant argument, which none else reads now."""
    binding = operation.inputs[argument].arguments[0]
    if not binding.name:
        return binding.value
    operations = _block(spec).operations
    own = type(operation).FromString(_constants(spec)[binding.name].SerializeToString())
    own.outputs[0].name = binding.name = f"own_{binding.name}"
    place = next(i for i, op in enumerate(operations) if op is operation or op == operation)
    operations.insert(place, own)
    return operations[place].attributes["val"]


def _read_as(spec: Any, kind: str, argument: str) -> set[str]:
    """Return the names of what the operators of a kind read as one argument."""
    return {op.inputs[argument].arguments[0].name for op in _operations(spec, kind)}


def _vectors(spec: Any, role: str) -> set[str]:
    return _read_as(spec, *{"norm": ("layer_norm", "gamma"), "bias": ("linear", "bias")}[role])


def shape_of(value: Any) -> tuple[int, ...]:
    return tuple(int(d.constant.size) for d in value.type.tensorType.dimensions)


def _blobs(path: Path) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield name, place of the data in weight.bin and shape of float blobs, as operators read."""
    spec = package.read_spec(path)
    constants = _constants(spec)
    content = (path / package.WEIGHTS_FILE).read_bytes()
    done = set()
    for operation in _block(spec).operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                constant = constants.get(binding.name)
                if constant is None or binding.name in done:
                    continue
                value = constant.attributes["val"]
                if value.WhichOneof("value") != "blobFileValue":
                    continue
                done.add(binding.name)
                record = content[value.blobFileValue.offset :][:RECORD]
                start = int(np.frombuffer(record[16:24], np.uint64)[0])
                if value.type.tensorType.dataType == 11:  # FLOAT32
                    yield binding.name, start, shape_of(value)


def weights(path: Path) -> dict[str, np.ndarray]:
    content = (path / package.WEIGHTS_FILE).read_bytes()
    return {
        name: np.frombuffer(content, np.float32, int(np.prod(shape)), start).reshape(shape)
        for name, start, shape in _blobs(path)
    }


def damage_layer(path: Path, layer: np.ndarray, damage: Damage) -> None:
    """Damage the tensor that holds a layer's matrix, in either order of its axes."""
    tensors = weights(path)
    _overwrite(path, mutants.find_tensor(tensors, layer), damage, tensors)


def _overwrite(path: Path, name: str, damage: Damage, tensors: dict[str, np.ndarray]) -> None:
    start = next(s for n, s, _ in _blobs(path) if n == name)
    file = path / package.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    values = damage(tensors[name]).astype(np.float32).tobytes()
    content[start : start + len(values)] = values
    file.write_bytes(content)


def _weight(role: str, damage: Damage, path: Path) -> None:
    tensors = weights(path)
    if role in ("norm", "bias"):
        wanted = _vectors(package.read_spec(path), role)
        names = [n for n, v in tensors.items() if v.ndim == 1 and n in wanted]
        name = names[len(names) // 2]
    else:
        matrices = [n for n, v in tensors.items() if v.ndim == 2]
        name = matrices[{"first": 0, "middle": len(matrices) // 3, "last": -1}[role]]
    _overwrite(path, name, damage, tensors)


def _stored_fp16(path: Path) -> None:
    """Store the attention's matrix as fp16 behind a ``cast``."""
    tensors = weights(path)
    name = [n for n, v in tensors.items() if v.ndim == 2][len(tensors) // 3]
    half = tensors[name].astype(np.float16)

    def change(spec: Any) -> None:
        from coremltools.proto import MIL_pb2

        block = _block(spec)
        constant = _constants(spec)[name]
        place = list(block.operations).index(constant)
        constant.outputs[0].name = f"{name}_short"
        for value_type in (constant.outputs[0].type, constant.attributes["val"].type):
            value_type.tensorType.dataType = MIL_pb2.FLOAT16
        value = constant.attributes["val"]
        value.ClearField("blobFileValue")
        value.immediateValue.tensor.bytes.values = half.tobytes()
        cast = MIL_pb2.Operation(type="cast")
        cast.inputs["x"].arguments.add(name=f"{name}_short")
        dtype = cast.inputs["dtype"].arguments.add().value
        dtype.type.tensorType.dataType = MIL_pb2.STRING
        dtype.immediateValue.tensor.strings.values.append("fp32")
        output = cast.outputs.add(name=name)
        output.type.CopyFrom(constant.outputs[0].type)
        output.type.tensorType.dataType = MIL_pb2.FLOAT32
        block.operations.insert(place + 1, cast)

    edit(change, path)


def _argument(kind: str, argument: str, new: float, spec: Any) -> None:
    _value(spec, _operations(spec, kind)[0], argument).immediateValue.tensor.floats.values[0] = new


def _integer(kind: str, argument: str, new: list[int], spec: Any) -> None:
    tensor = _value(spec, _operations(spec, kind)[-1], argument).immediateValue.tensor
    if tensor.WhichOneof("value") == "ints":
        tensor.ints.values[:] = new
    else:
        tensor.bytes.values = np.array(new, np.int32).tobytes()


def _flag(kind: str, place: int, argument: str, spec: Any) -> None:
    tensor = _value(spec, _operations(spec, kind)[place], argument).immediateValue.tensor
    tensor.bools.values[0] = not tensor.bools.values[0]


def _replace(old: str, new: str, spec: Any) -> None:
    _operations(spec, old)[0].type = new


def _drop_clip(spec: Any) -> None:
    """Let the readers of the clamp read what it clamps."""
    operation = _operations(spec, "clip")[0]
    old, new = operation.outputs[0].name, operation.inputs["x"].arguments[0].name
    for other in _block(spec).operations:
        for argument in other.inputs.values():
            for binding in argument.arguments:
                if binding.name == old:
                    binding.name = new


def _exchange_inputs(kind: str, place: int, spec: Any) -> None:
    operation = _operations(spec, kind)[place]
    one, other = operation.inputs["x"].arguments[0], operation.inputs["y"].arguments[0]
    one.name, other.name = other.name, one.name


def _exchange(spec: Any) -> None:
    """Let the first attention's queries and keys change places."""
    first, second = _operations(spec, "linear")[1:3]
    for argument in ("weight", "bias"):
        one, other = first.inputs[argument].arguments[0], second.inputs[argument].arguments[0]
        one.name, other.name = other.name, one.name


def _gelu(spec: Any) -> None:
    value = _value(spec, _operations(spec, "gelu")[0], "mode")
    value.immediateValue.tensor.strings.values[0] = "TANH_APPROXIMATION"


def _square_matmul(spec: Any) -> None:
    """Transpose the first attention's context, a square matrix a head."""
    for operation in _operations(spec, "matmul"):
        shapes = {op.outputs[0].name: op for op in _block(spec).operations}
        made = shapes.get(operation.inputs["y"].arguments[0].name)
        if made is not None and made.type == "matmul":
            tensor = _value(spec, operation, "transpose_y").immediateValue.tensor
            tensor.bools.values[0] = not tensor.bools.values[0]
            return
    raise AssertionError("no square factor")


def _swap_outputs(spec: Any) -> None:
    block = _block(spec)
    first, second = block.outputs
    for operation in block.operations:
        for output in operation.outputs:
            if output.name in (first, second):
                output.name = second if output.name == first else first


def _entry(key: str, value: Any, spec: Any) -> None:
    spec.description.metadata.userDefined[package.PREFIX + key] = json.dumps(value)


def _labels(change: Callable[[list[str]], list[str]], spec: Any) -> None:
    _entry("labels", change(package.user_metadata(spec)["labels"]), spec)


def mutants_of() -> list[Mutant]:
    """Return the format's mutants."""
    found = [
        Mutant(FORMAT, kind, name, partial(_weight, role, damage))
        for name, (kind, role, damage) in WEIGHT_DAMAGES.items()
    ]
    found.append(Mutant(FORMAT, "layer made fp16", "stored as fp16", _stored_fp16))

    def add(kind: str, name: str, change: Edit) -> None:
        found.append(Mutant(FORMAT, kind, name, partial(edit, change)))

    for value in (1e-3, 1e-4, 0.0):
        change = partial(_argument, "layer_norm", "epsilon", value)
        add("ε changed", f"a norm's, 1e-5 to {value:g}", change)
    add("clamp changed", "lower bound to 0.9", partial(_argument, "clip", "alpha", 0.9))
    add("clamp changed", "lower bound to -0.9", partial(_argument, "clip", "alpha", -0.9))
    add("clamp changed", "upper bound to 2", partial(_argument, "clip", "beta", 2.0))
    add("clamp changed", "no clamp", _drop_clip)
    add("axis changed", "softmax of the head", partial(_integer, "softmax", "axis", [0]))
    add("axis changed", "rows and columns of the context", _square_matmul)
    add("axis changed", "queries and keys exchanged", _exchange)
    add("operator replaced", "sigmoid by tanh", partial(_replace, "sigmoid", "tanh"))
    add("operator replaced", "exp by sigmoid", partial(_replace, "exp", "sigmoid"))
    add("operator replaced", "division by product", partial(_replace, "real_div", "mul"))
    add("operator replaced", "sum by difference", partial(_replace, "add", "sub"))
    add("operator replaced", "ReLU by ReLU6", partial(_replace, "relu", "relu6"))
    add("operator replaced", "mean by maximum", partial(_replace, "reduce_mean", "reduce_max"))
    add("operator replaced", "GELU by its tanh approximation", _gelu)
    exchange = partial(_exchange_inputs, "real_div", 0)
    add("operator replaced", "a division the other way", exchange)
    add("outputs swapped", "names", _swap_outputs)
    add("labels shifted", "by one", partial(_labels, lambda v: v[1:] + v[:1]))
    add("labels shifted", "two swapped", partial(_labels, lambda v: [v[1], v[0], *v[2:]]))
    add("labels shifted", "one lost", partial(_labels, lambda v: v[:-1]))
    for key, value in (
        ("model", "other"),
        ("recipe_sha256", "0" * 64),
        ("precision", "fp16"),
        ("preprocessing", {"scale": 1.0}),
    ):
        add("metadata of another model", key, partial(_entry, key, value))
    clear = partial(edit, lambda spec: spec.description.metadata.userDefined.clear())
    found.append(Mutant(FORMAT, "metadata of another model", "none", clear))
    return found
