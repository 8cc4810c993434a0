"""From the exporter's model to the finished file: simple, named, checked, reproducible."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from flowexport import __version__
from flowexport.core.errors import ConversionError
from flowexport.lowering import LoweredProgram
from flowexport.targets.onnx.function import DOMAIN

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto


def finish(model: ModelProto, program: LoweredProgram, form: str) -> ModelProto:
    """Simplify a model, give it the program's names and metadata, and check it.

    Requires: the attention nodes and their functions are in place.
    Ensures: both are still there; nothing depends on the machine, the path or
    the time; the full checker and strict shape inference accept it.

    Raises:
        ConversionError: the simplifier lost an attention, or a check failed.
    """
    import onnx
    import onnxsim

    before = attention_keys(model)
    forget_origin(model)
    simplified, same = onnxsim.simplify(model)
    if not same:
        raise ConversionError(f"convert onnx {program.model}: onnxsim changed the results.")
    after = attention_keys(simplified)
    functions = {(f.domain, f.name, f.overload) for f in simplified.functions}
    if after != before or not set(after) <= functions:
        raise ConversionError(
            f"convert onnx {program.model}: the simplified file has attention nodes {after} and"
            f" functions {sorted(functions)}; expected {before}."
        )
    model = simplified
    forget_origin(model)
    _rename_dimensions(model.graph, program)
    model.graph.name = program.model
    model.producer_name, model.producer_version = "flowexport", __version__
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, metadata(program, form))
    try:
        onnx.checker.check_model(model, full_check=True)
        return onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(
            f"convert onnx {program.model}: the ONNX checker refuses the file: {error}"
        ) from error


def metadata(program: LoweredProgram, form: str) -> dict[str, str]:
    """Return the file's ``metadata_props``: JSON where a value is not plain text."""
    import onnx
    import torch

    state = {"state": json.dumps(dict(program.state))} if program.state else {}
    return {
        **state,
        "flowexport_version": __version__,
        "torch_version": torch.__version__,
        "onnx_version": onnx.__version__,
        "model": program.model,
        "recipe_sha256": program.recipe_sha256,
        "labels": json.dumps(list(program.labels), ensure_ascii=False),
        "preprocessing": json.dumps(
            dict(program.preprocessing), sort_keys=True, ensure_ascii=False
        ),
        "precision": program.precision.value,
        "form": form,
    }


def attention_keys(model: ModelProto) -> list[tuple[str, str, str]]:
    """Return the (domain, name, overload) of every attention node, in order."""
    return [(n.domain, n.op_type, n.overload) for n in model.graph.node if n.domain == DOMAIN]


def forget_origin(model: ModelProto) -> None:
    """Drop stack traces, source paths and the exporter's notes from a model."""
    model.ClearField("doc_string")
    _forget(model.graph)
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        for node in function.node:
            _forget_node(node)


def _forget(graph: GraphProto) -> None:
    for item in (graph, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for node in graph.node:
        _forget_node(node)


def _forget_node(node: Any) -> None:
    node.ClearField("doc_string")
    node.ClearField("metadata_props")
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        if attribute.HasField("g"):
            _forget(attribute.g)


def _rename_dimensions(graph: GraphProto, program: LoweredProgram) -> None:
    """Give dynamic dimensions the specs' names; the exporter's are torch's symbols (``s77``)."""
    names: dict[str, str] = {}
    for values, specs in ((graph.input, program.inputs), (graph.output, program.outputs)):
        for value, spec in zip(values, specs, strict=True):
            if value.name != spec.name:
                raise ConversionError(
                    f"convert onnx {program.model}: {value.name!r} was exported for {spec.name!r}."
                )
            for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
                if isinstance(size, int):
                    dim.dim_value = size
                else:
                    names[dim.dim_param] = size
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), dim.dim_param
                )
