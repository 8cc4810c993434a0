"""The body of an attention node: its torch form, turned into an ONNX function.

The form is exported on its own and its graph becomes the function, so the
torch form stays the one source of truth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowexport.core.errors import ConversionError, FlowExportError
from flowexport.ops.descriptor import AttentionSite
from flowexport.ops.segments import loops

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto

DOMAIN = "flowexport"
INPUTS = ("q", "k", "v")
OUTPUT = "y"


class _Form(nn.Module):
    """A form and its arguments; ``tied`` says that L = S, which dimensions of one name do not."""

    def __init__(
        self, form: Callable[..., Tensor], arguments: tuple[Any, ...], *, tied: bool
    ) -> None:
        super().__init__()
        self.form, self.arguments, self.tied = form, arguments, tied

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.tied:
            torch._check(q.shape[1] == k.shape[1])
        return self.form(q, k, v, *self.arguments)


def body_of_any_size(
    form: Callable[..., Tensor], site: AttentionSite, dtype: torch.dtype, opset: int
) -> ModelProto | None:
    """Export a form for every B, L, S, H, D and M, or return None where the form fixes one.

    L and S stay one size where the site has them equal, as the causal forms need.
    """
    tied = site.q_shape[1] == site.k_shape[1]
    sizes = {"B": 2, "L": 6, "S": 6 if tied else 7, "H": 3, "D": 4, "M": 5}
    dims = {name: torch.export.Dim(name) for name in sizes}
    axes = (("B", "L", "H", "D"), *(("B", "L" if tied else "S", "H", last) for last in "DM"))
    example = tuple(torch.zeros([sizes[a] for a in names], dtype=dtype) for names in axes)
    dynamic = tuple({i: dims[a] for i, a in enumerate(names)} for names in axes)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _Form(form, site.arguments, tied=tied), example, dynamic_shapes=dynamic
            )
    except Exception:
        return None
    return _export(exported, opset)


def body_of_this_size(
    form: Callable[..., Tensor], site: AttentionSite, dtype: torch.dtype, opset: int
) -> ModelProto:
    """Export a form for a site's own sizes; only what the program has dynamic stays so.

    Raises:
        ConversionError: ``torch.export`` refused the form.
        FlowExportError: the form does not serve the site's variant.
    """
    names = {d for s in (site.q_shape, site.k_shape, site.v_shape) for d in s if isinstance(d, str)}
    dims = {name: torch.export.Dim(f"d{i}") for i, name in enumerate(sorted(names))}
    sizes = {name: 2 + i for i, name in enumerate(sorted(names))}
    example, dynamic = [], []
    for shape in (site.q_shape, site.k_shape, site.v_shape):
        example.append(
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in shape], dtype=dtype)
        )
        dynamic.append({i: dims[d] for i, d in enumerate(shape) if isinstance(d, str)})
    try:
        with torch.no_grad(), loops():
            exported = torch.export.export(
                _Form(form, site.arguments, tied=site.q_shape[1] == site.k_shape[1]),
                tuple(example),
                dynamic_shapes=tuple(dynamic),
            )
    except FlowExportError:
        raise
    except Exception as error:
        raise ConversionError(
            f"convert onnx {site.module_path}: torch.export refused the attention's form:"
            f" {str(error).strip().splitlines()[0]}",
            fix="pin another form with the option 'form'",
        ) from error
    return _export(exported, opset)


def as_function(
    body: ModelProto, name: str, attributes: tuple[str, ...], overload: str
) -> FunctionProto:
    """Return a model's graph as the function ``flowexport::<name>``.

    Initializers become Constant nodes, because a function has none.
    """
    from onnx import helper

    graph = body.graph
    nodes = [
        helper.make_node(
            "Constant", [], [tensor.name], name=f"constant_{tensor.name}", value=tensor
        )
        for tensor in graph.initializer
    ]
    nodes += graph.node
    function = helper.make_function(
        DOMAIN,
        name,
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        nodes,
        [o for o in body.opset_import if o.domain == ""],
        attributes,
    )
    function.overload = overload
    for node in function.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    return function


def _export(exported: torch.export.ExportedProgram, opset: int) -> ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported,
            (),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto
