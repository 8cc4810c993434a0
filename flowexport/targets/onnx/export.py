"""From a lowered program to an ONNX model with one node and one function per attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowexport.core.errors import ConversionError, LoweringError
from flowexport.core.types import Precision
from flowexport.lowering import LoweredProgram, decompose
from flowexport.lowering.passes import before_decomposition
from flowexport.ops.descriptor import AttentionDescriptor, AttentionSite, Choice
from flowexport.targets.onnx.function import (
    DOMAIN,
    as_function,
    body_of_any_size,
    body_of_this_size,
)

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto
    from torch.export import ExportedProgram

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
"""Without both attributes TensorRT inlines the function and never asks for the plugin."""

_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class SiteForm:
    """How one attention left the exporter; ``function`` is empty where it was decomposed."""

    module: str
    op: str
    form: str
    reason: str
    function: str

    def to_json(self) -> dict[str, str]:
        return dict(self.__dict__)


def export(
    program: LoweredProgram,
    ops: Sequence[AttentionDescriptor],
    *,
    opset: int,
    pinned: str | None,
    precision: Precision | None = None,
) -> tuple[ModelProto, tuple[SiteForm, ...]]:
    """Export a program, each attention as a ``flowexport::<name>`` node with its function.

    An attention whose descriptor gives no ONNX attributes is decomposed instead.

    Args:
        precision: that forms are chosen for, where the file is quantised afterwards.

    Raises:
        LoweringError: the pinned form does not exist.
        ConversionError: ``torch.onnx`` refused the program.
    """
    fused = [op for op in ops if op.attributes is not None]
    plain = [op for op in ops if op.attributes is None]
    report = []
    if any(site.op == op.name for site in program.attentions for op in plain):
        decomposed, choices = decompose(program, "onnx", plain, pinned=pinned)
        sites = [s for op in plain for s in program.attentions if s.op == op.name]
        report = [
            SiteForm(site.module_path, site.op, choice.form, choice.reason, "")
            for site, choice in zip(sites, choices, strict=True)
        ]
        exported = decomposed.exported
    else:
        exported = program.exported
    by_name = {op.name: op for op in fused}
    kept = [site for site in program.attentions if site.op in by_name]
    choices = tuple(_choose(by_name[site.op], site, program, pinned, precision) for site in kept)
    if kept:
        exported, misses = before_decomposition(
            exported, [op.overload for op in fused], [c.form for c in choices]
        )
        choices = tuple(
            c.told(m).told(_not_absorbed(by_name[s.op], c.form))
            for s, c, m in zip(kept, choices, misses, strict=True)
        )
        exported = exported.run_decompositions({op.overload: _symbolic(op) for op in fused})
    model = _to_onnx(exported, program, opset)
    nodes = [n for n in model.graph.node if n.domain == DOMAIN]
    if len(nodes) != len(kept):
        raise ConversionError(
            f"convert onnx {program.model}: the exporter kept {len(nodes)} attention nodes;"
            f" expected {len(kept)}."
        )
    names = {n.name for n in model.graph.node}
    library = _Functions(_DTYPES[program.precision], opset)
    for node, site, choice in zip(nodes, kept, choices, strict=True):
        node.name = _unused(site.module_path or node.name, names)
        node.overload = library.overload(by_name[site.op], site, choice.form)
        suffix = f":{node.overload}" if node.overload else ""
        function = f"{DOMAIN}::{site.op}{suffix}"
        report.append(SiteForm(site.module_path, site.op, choice.form, choice.reason, function))
    model.functions.extend(library.functions)
    return model, tuple(report)


def _unused(name: str, taken: set[str]) -> str:
    """Return a node name of its own: a module may be called twice, ORT wants names once."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    taken.add(candidate)
    return candidate


class _Functions:
    """The functions of one file: one a (attention, form, arguments), shared by its nodes.

    The first of an attention has no overload name. TensorRT looks functions up
    by name alone and takes the first for all of them, which is harmless where
    they differ by form only and wrong otherwise: inline before building
    without the plugin.
    """

    def __init__(self, dtype: torch.dtype, opset: int) -> None:
        self.dtype, self.opset = dtype, opset
        self.functions: list[FunctionProto] = []
        self._overloads: dict[tuple[Any, ...], str] = {}
        self._general: dict[tuple[Any, ...], ModelProto | None] = {}

    def overload(self, op: AttentionDescriptor, site: AttentionSite, form: str) -> str:
        """Return the overload name of a site's function, made when first asked for."""
        same_length = site.q_shape[1] == site.k_shape[1]
        key: tuple[Any, ...] = (op.name, form, repr(site.arguments), same_length)
        if key not in self._general:
            self._general[key] = body_of_any_size(op.forms[form], site, self.dtype, self.opset)
        body = self._general[key]
        if body is None:
            key = (*key, site.q_shape, site.k_shape, site.v_shape)
        if key not in self._overloads:
            body = body or body_of_this_size(op.forms[form], site, self.dtype, self.opset)
            taken = sum(f.name == op.name for f in self.functions)
            self._overloads[key] = f"{form}_{taken}" if taken else ""
            names = (*_attributes(op, site.arguments),)
            self.functions.append(as_function(body, op.name, names, self._overloads[key]))
        return self._overloads[key]


def _choose(
    op: AttentionDescriptor,
    site: AttentionSite,
    program: LoweredProgram,
    pinned: str | None,
    precision: Precision | None,
) -> Choice:
    if pinned is None:
        return op.choose("onnx", (precision or program.precision).value, site)
    if pinned not in op.forms:
        raise LoweringError(
            f"lower onnx {program.model}: form is {pinned!r}; expected one of {sorted(op.forms)}."
        )
    return Choice(pinned, program.pin_reason)


def _not_absorbed(op: AttentionDescriptor, form: str) -> str | None:
    """Say that the node leaves out the layers that a form would absorb, or None."""
    absorbs = op.absorbing is not None and form in op.absorbing.forms
    return f"a {op.name} node holds the attention alone" if absorbs else None


def _attributes(op: AttentionDescriptor, arguments: tuple[Any, ...]) -> dict[str, Any]:
    assert op.attributes is not None
    return {**op.attributes(arguments), **PLUGIN}


def _symbolic(op: AttentionDescriptor) -> Callable[..., Tensor]:
    """Return what stands in for the operator while the graph is traced again."""

    def node(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{op.name}",
            (q, k, v),
            _attributes(op, arguments),
            dtype=v.dtype,
            shape=(*q.shape[:3], v.shape[3]),
            version=1,
        )

    return node


def _to_onnx(exported: ExportedProgram, program: LoweredProgram, opset: int) -> ModelProto:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = torch.onnx.export(
                exported,
                (),
                input_names=[s.name for s in program.inputs],
                output_names=[s.name for s in program.outputs],
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"convert onnx {program.model}: torch.onnx refused the program: {first}"
        ) from error
    assert result is not None
    return result.model_proto
