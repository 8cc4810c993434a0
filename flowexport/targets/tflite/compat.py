"""Files that have to run on an older TFLite runtime: what it gets wrong is found in the file."""

from __future__ import annotations

from typing import Any

from flowexport.core.errors import ConversionError
from flowexport.targets.tflite.flatbuffer import operators

OLD = "tflite-2.14"
RUNTIMES = (OLD,)
"""Values of the option ``compat``."""


def require_compatible(model: Any, runtime: str, name: str) -> None:
    """Refuse a finished model that the runtime refuses, or computes wrongly without a word.

    tflite-runtime 2.14 reads the first scale alone of a FULLY_CONNECTED with
    float inputs and int8 weights that have one scale an output channel (error
    0.94 of the largest output, measured against 0.02 on LiteRT), and has no int8 DIV.

    Args:
        model: as ``flatbuffer.read_model`` returns it.
        runtime: one of ``RUNTIMES``.
        name: the model's, for messages.

    Raises:
        ConversionError: it holds such an operator.
    """
    wrong = [*hybrid_channelwise(model), *int8_divisions(model)]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ConversionError(
            f"convert tflite {name}: {runtime} cannot compute {shown}; expected int8 weights with"
            " one scale a tensor, and float divisions.",
            fix="--precision fp32 or fp16, or leave `compat` out",
        )


def hybrid_channelwise(model: Any) -> list[str]:
    """Return the FULLY_CONNECTED with float inputs whose int8 weights have several scales."""
    found = []
    for graph, op, kind in operators(model):
        if kind != "FULLY_CONNECTED":
            continue
        data, weights = (graph.tensors[int(i)] for i in op.inputs[:2])
        scales = weights.quantization.scale if weights.quantization is not None else None
        if _is(data, "FLOAT32") and _is(weights, "INT8") and scales is not None and len(scales) > 1:
            found.append(f"{kind} {_output(graph, op)} ({len(scales)} scales)")
    return found


def int8_divisions(model: Any) -> list[str]:
    """Return the DIV of int8 tensors."""
    return [
        f"int8 {kind} {_output(graph, op)}"
        for graph, op, kind in operators(model)
        if kind == "DIV" and _is(graph.tensors[int(op.inputs[0])], "INT8")
    ]


def _is(tensor: Any, dtype: str) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    return bool(tensor.type == getattr(schema.TensorType, dtype))


def _output(graph: Any, op: Any) -> str:
    return str(graph.tensors[int(op.outputs[0])].name.decode(errors="replace"))
