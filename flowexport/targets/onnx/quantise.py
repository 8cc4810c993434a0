"""Quantised ONNX files: integer products by ONNX Runtime's quantizer, stored weights by ours.

What stays in floating point is decided by named rules
(:mod:`flowexport.lowering.quantisation`) and proved on the finished file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowexport.core.errors import ConversionError
from flowexport.core.types import Options, Precision
from flowexport.lowering.layers import Layer, OperatorNames, weighted_layers
from flowexport.lowering.program import LoweredProgram
from flowexport.lowering.quantisation import (
    Quantisation,
    Treatment,
    decide,
    prove,
    read_probes,
    treatment_of,
)
from flowexport.targets.onnx.function import DOMAIN
from flowexport.targets.onnx.integer import (
    channels,
    clip,
    dynamic,
    ranges,
    static,
    weight_place,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

INTEGER = ("MatMulInteger", "QLinearMatMul")


def quantise(
    model: ModelProto,
    program: LoweredProgram,
    options: Options,
    *,
    symmetric: bool = False,
    function: str = "",
) -> tuple[ModelProto, Quantisation]:
    """Quantise a finished float32 model.

    ``int8-dynamic``: DynamicQuantizeLinear and MatMulInteger. ``int8-static``:
    QuantizeLinear and DequantizeLinear around each product's operands. Weights
    alone: a DequantizeLinear behind each.

    On x86 without VNNI the product of unsigned activations and signed weights
    saturates in 16 bits, silently (measured: 12 dB instead of 48): the scales of
    the weights are chosen so that it cannot (:func:`~flowexport.targets.onnx.integer.safe_ranges`).

    Args:
        model: with named initializers and attention nodes.
        program: what it was exported from.
        options: precision, ``keep_float``, and the calibration samples' file.
        symmetric: signed activations with the zero point 0 and weights in their whole
            range, as TensorRT wants them.

    Raises:
        ConversionError: a rule does not hold in the result.
    """
    where = f"convert onnx {program.model}"
    layers = weighted_layers(program)
    decisions = decide(
        layers, options.precision, options.keep_float, where=where, integer_convolutions=False
    )
    biased = options.precision is Precision.INT8_STATIC
    model = _split_biases(model) if biased else _split_gemms(model)
    paths = _name_nodes(model, layers, where)
    nodes = {name: treatment_of(parts, decisions) for name, parts in paths.items()}
    integer = [n for n, t in nodes.items() if t is Treatment.INTEGER]
    functions = [f.SerializeToString(deterministic=True) for f in model.functions]
    calibration, clipping = None, {}
    if integer and options.precision is Precision.INT8_DYNAMIC:
        model = dynamic(model, integer)
    elif integer:
        plain = type(model)()
        plain.CopyFrom(model)  # the quantizer moves the constants of its own out of it
        model, calibration = static(model, integer, options, program, symmetric)
        assert options.calibration is not None
        clipping = clip(plain, read_probes(options.calibration, function), ranges(model))
    _store(model, [n for n, t in nodes.items() if t is Treatment.WEIGHTS])
    _compact(model, {*nodes, *(f"{n}_quant" for n in nodes)})
    if functions != [f.SerializeToString(deterministic=True) for f in model.functions]:
        raise ConversionError(f"{where}: the quantizer changed an attention's function.")
    check_core(model, len(program.attentions), where)
    found = _found(model, nodes, paths)
    prove(decisions, found, paths, where)
    for entry in model.metadata_props:
        if entry.key == "precision":
            entry.value = options.precision.value
    return model, Quantisation(decisions, found, calibration, clipping=clipping)


def _split_gemms(model: ModelProto) -> ModelProto:
    """Turn each Gemm into MatMul and Add: only a MatMul has an integer form with a float bias."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
    return wrapped.model


def _split_biases(model: ModelProto) -> ModelProto:
    """Return a copy in which each Gemm's bias is an Add of its own.

    ONNX Runtime turns a Gemm without bias whose operands are dequantised into an
    integer one with a float result; with a float bias, or as MatMul and Add, it
    multiplies in floating point after all.
    """
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    nodes = []
    for node in copied.graph.node:
        nodes.append(node)
        biased = node.op_type == "Gemm" and len(node.input) == 3
        if not biased or any(a.name in ("alpha", "beta") and a.f != 1 for a in node.attribute):
            continue
        bias, result = node.input.pop(), node.output[0]
        node.output[0] = f"{result}_product"
        nodes.append(onnx.helper.make_node("Add", [node.output[0], bias], [result]))
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    return copied


def _name_nodes(
    model: ModelProto, layers: Sequence[Layer], where: str
) -> dict[str, tuple[str, ...]]:
    """Name each weighted node after its module; return the module paths by node name."""
    initializers = {i.name: i for i in model.graph.initializer}
    names = OperatorNames(layers, where, taken=(n.name for n in model.graph.node))
    for node in model.graph.node:
        place = weight_place(node, initializers)
        if place is None:
            continue
        tensor = initializers[node.input[place[0]]]
        operator = f"node {node.name or node.output[0]}"
        node.name = names.name(operator, channels(tensor, place[1]), tensor.dims)
    return names.paths


def _store(model: ModelProto, names: Sequence[str]) -> None:
    """Store the weights of these nodes in 8 bits, one scale an output channel."""
    from onnx import helper, numpy_helper

    initializers = {i.name: i for i in model.graph.initializer}
    stored: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if node.name not in names:
            continue
        place = weight_place(node, initializers)
        assert place is not None
        position, axis = place
        tensor = initializers[node.input[position]]
        if tensor.name not in stored:
            values = numpy_helper.to_array(tensor)
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = np.abs(values).max(axis=others, keepdims=True) / 127
            scale[scale == 0] = 1
            whole = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
            stem = tensor.name
            model.graph.initializer.extend(
                [
                    numpy_helper.from_array(whole, f"{stem}_quantized"),
                    numpy_helper.from_array(
                        scale.reshape(-1).astype(values.dtype), f"{stem}_scale"
                    ),
                ]
            )
            stored[tensor.name] = helper.make_node(
                "DequantizeLinear",
                [f"{stem}_quantized", f"{stem}_scale"],
                [stem],
                axis=axis,
            )
    for name, node in stored.items():
        model.graph.initializer.remove(initializers[name])
        model.graph.node.insert(0, node)


def _compact(model: ModelProto, kept: Collection[str]) -> None:
    """Drop what the quantizer adds and nothing needs: zeros, names of helper nodes, shapes.

    A small model's file would else be a third names.
    """
    from onnx import numpy_helper

    graph = model.graph
    graph.ClearField("value_info")
    zeros: dict[str, str] = {}
    first: dict[tuple[int, ...], str] = {}
    for i in graph.initializer:
        if i.name.endswith("_zero_point") and i.dims and not numpy_helper.to_array(i).any():
            zeros[i.name] = first.setdefault((i.data_type, *i.dims), i.name)
    short: dict[str, str] = {}
    ends = {o.name for o in graph.output}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.input[-1] in zeros:
            del node.input[-1]
        if node.domain != DOMAIN and node.name not in kept:
            node.ClearField("name")
        for name in node.output:
            if name not in ends:
                short[name] = f"v{len(short)}"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = short.get(name) or zeros.get(name, name)
    used = {name for node in graph.node for name in node.input}
    for tensor in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(tensor)


def _found(
    model: ModelProto, nodes: Mapping[str, Treatment], paths: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """Return what the file does at each layer: ``integer``, ``weights`` or ``float``."""
    from onnx import TensorProto

    types = {i.name: i.data_type for i in model.graph.initializer}
    bytes_ = (TensorProto.INT8, TensorProto.UINT8)
    producers = {o: n for n in model.graph.node for o in n.output}

    def from_bytes(name: str) -> bool:
        """Whether a tensor is 8-bit data, widened: a stored weight or a rounded activation."""
        node = producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return False
        source = producers.get(node.input[0])
        return types.get(node.input[0]) in bytes_ or (
            source is not None and source.op_type == "QuantizeLinear"
        )

    found: dict[str, str] = {}
    for node in model.graph.node:
        name = node.name.removesuffix("_quant")
        if name not in nodes:
            continue
        if node.op_type in INTEGER:
            state = "integer" if types.get(node.input[1]) in bytes_ else "float"
        else:
            rounded = [from_bytes(i) for i in node.input[:2]]
            state = "integer" if all(rounded) else "weights" if any(rounded) else "float"
        for path in paths[name]:
            found[path] = state if found.get(path, state) == state else "mixed"
    return found


def check_core(model: ModelProto, attentions: int, where: str) -> None:
    """Raise ConversionError unless every attention core of a file is in floating point."""
    integers = {*INTEGER, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
    kept = sum(n.domain == DOMAIN for n in model.graph.node)
    inside = [n.op_type for f in model.functions for n in f.node if n.op_type in integers]
    if kept != attentions or inside:
        raise ConversionError(
            f"{where}: the file has {kept} attention cores with {inside or 'no'} integer"
            f" operators; expected {attentions} without."
        )
