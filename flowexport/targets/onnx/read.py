"""Reading a finished ONNX file: names, operators, fusions, metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.stored import stored
from flowexport.core.types import TensorSpec
from flowexport.targets.onnx.function import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto


def read_model(path: Path) -> ModelProto:
    """Return an ONNX file's model.

    Raises:
        InputError: the file cannot be read, is no ONNX, or is cut short.
    """
    import onnx
    from google.protobuf.message import DecodeError

    where = f"read onnx {path.name}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}.") from error
    try:
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{where}: {len(data)} bytes are no complete ONNX model: {reason}",
            fix="check that the file is an .onnx file and was copied whole",
        ) from error
    if not model.graph.node or not model.graph.output:
        raise InputError(f"{where}: {len(data)} bytes hold no graph; expected an ONNX model.")
    return model


def inline(model: ModelProto) -> ModelProto:
    """Return the model with every function replaced by its body."""
    import onnx.inliner

    return onnx.inliner.inline_local_functions(model)


def nodes_within(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield nodes and, behind a loop or branch, those of its body."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_within(attribute.g.node)


def operators(model: ModelProto) -> dict[str, int]:
    """Count operators of the main graph and of its loops' bodies by name, most frequent first."""
    names = (
        f"{n.domain}::{n.op_type}" if n.domain else n.op_type
        for n in nodes_within(model.graph.node)
    )
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def scalars(model: ModelProto) -> dict[str, int]:
    """Return how often each single float occurs: ε, bounds of clamps, factors.

    Initializers, constants and attributes, those of functions once a function.
    """
    from onnx import numpy_helper

    counts: Counter[str] = Counter()

    def count(tensor: Any) -> None:
        value = numpy_helper.to_array(tensor)
        if value.size == 1 and value.dtype.kind == "f":
            counts[f"{float(value.reshape(())):.9g}"] += 1

    for tensor in model.graph.initializer:
        count(tensor)
    for node in nodes_within((*model.graph.node, *(n for f in model.functions for n in f.node))):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                count(attribute.t)
            elif attribute.HasField("f"):
                counts[f"{attribute.f:.9g}"] += 1
    return dict(sorted(counts.items()))


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    """Return the initializers' values by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def fusions(model: ModelProto) -> dict[str, int]:
    """Count attention nodes that have their function in the file, by operator."""
    defined = {(f.domain, f.name, f.overload) for f in model.functions}
    nodes = (n for n in model.graph.node if n.domain == DOMAIN)
    return dict(Counter(n.op_type for n in nodes if (n.domain, n.op_type, n.overload) in defined))


def specs(values: Any) -> tuple[TensorSpec, ...]:
    """Return the specs of a graph's inputs or outputs."""
    return tuple(_spec(value) for value in values)


def _spec(value: ValueInfoProto) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim
    )
    return TensorSpec(
        value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    )


def describe(path: Path) -> dict[str, Any]:
    """Return what ``flowexport inspect`` shows of an ONNX file.

    Raises:
        InputError: the file is no complete ONNX model.
    """
    from flowexport.targets.onnx.integer import ranges

    model = read_model(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        "inputs": [
            s.to_json() for s in specs(v for v in model.graph.input if v.name not in weights)
        ],
        "outputs": [s.to_json() for s in specs(model.graph.output)],
        "operators": operators(model),
        "operators_inlined": operators(inline(model)),
        "scalars": scalars(model),
        "stored": stored(constants(model)),
        "ranges": ranges(model),
        "fusions": fusions(model),
        "metadata": {p.key: p.value for p in model.metadata_props},
        "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "ir_version": model.ir_version,
        "size_bytes": path.stat().st_size,
    }
