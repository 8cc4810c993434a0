"""Fold what depends on weights alone (position embeddings, reshaped scales)."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit

# A folded tensor may be this much larger than what it was computed from.
LARGEST_GROWTH = 2


def fold_constants(exported: ExportedProgram) -> ExportedProgram:
    """Evaluate calls whose tensors are all weights; the result becomes a parameter.

    Before: ``pe -> slice -> transpose -> add(x)``. After: ``pe_transpose -> add(x)``.
    Requires: nothing. Ensures: no pure call on weights alone is left, save one
    whose result is over twice the size of its inputs (an ``expand``).
    """
    edit = GraphEdit(exported)
    values: dict[Node, torch.Tensor] = dict(edit.weights)
    for node in edit.graph.nodes:
        inputs = node.all_input_nodes
        if (
            node.op != "call_function"
            or not isinstance(node.target, torch._ops.OpOverload)
            or node.target._schema.is_mutable
            or not inputs
            or any(n not in values for n in inputs)
        ):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        largest = LARGEST_GROWTH * sum(values[n].numel() for n in inputs)
        if isinstance(value, torch.Tensor) and value.numel() <= largest:
            values[node] = value
    for node in list(edit.graph.nodes):
        needed = (
            node in values
            and node.op == "call_function"
            and any(u not in values for u in node.users)
        )
        if needed and values[node].is_floating_point():
            source = node
            while source not in edit.weights:
                source = source.all_input_nodes[0]
            folded = edit.parameter(source, node.name, values[node].clone())
            node.replace_all_uses_with(folded)
    return edit.finish()
