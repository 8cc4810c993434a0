"""Remove dropout: it is the identity in inference."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from flowexport.lowering.passes._edit import GraphEdit, calls

aten = torch.ops.aten


def remove_dropout(exported: ExportedProgram) -> ExportedProgram:
    """Remove dropout that does not train.

    Before: ``linear -> dropout(p, train=False) -> add``. After: ``linear -> add``.
    Requires: nothing. Ensures: no dropout node with train=False is left.
    """
    edit = GraphEdit(exported)
    for node in list(edit.graph.nodes):
        if calls(node, aten.dropout.default) and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            edit.graph.erase_node(node)  # random, so not dead code to torch
    return edit.finish()
