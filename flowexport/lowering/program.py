"""A lowered program: an exported graph with each attention kept as one node."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from flowexport.core.errors import InputError, LoweringError
from flowexport.core.types import FORWARD, Precision, TensorSpec
from flowexport.lowering.passes import (
    absorb_projections,
    after_decomposition,
    before_decomposition,
    clean,
)
from flowexport.ops.descriptor import AttentionDescriptor, AttentionSite, Choice

_TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class LoweredProgram:
    """What every target converts.

    Attributes:
        model: the model's name.
        exported: inference graph, dropout gone, inputs and outputs in the order
            of ``inputs`` and ``outputs``.
        inputs, outputs: names, shapes (with named dynamic dimensions), dtypes.
            Inputs and outputs stay float32 whatever the precision.
        precision: dtype of weights and activations inside ``exported``.
        attentions: every attention node, in execution order.
        labels: class names in output order, or empty.
        preprocessing: how samples become inputs, as the evaluation does it.
        recipe_sha256: hash of the recipe that made it.
        functions: more programs of the same weights: a causal model's ``step``, and
            ``forward_<length>`` for other lengths.
        entry: this program's own name: ``forward``, or ``forward_<length>`` of the longest bucket.
        state: of a ``step``: state input -> the output that is its next value.
        pin_reason: why a form is pinned, where one is; for the artifact.
    """

    model: str
    exported: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    attentions: tuple[AttentionSite, ...] = ()
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    recipe_sha256: str = ""
    functions: Mapping[str, LoweredProgram] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    entry: str = FORWARD
    pin_reason: str = "pinned by the recipe"

    def pinned_because(self, reason: str) -> LoweredProgram:
        """Return the program, its functions too, with why a form is pinned."""
        functions = {n: f.pinned_because(reason) for n, f in self.functions.items()}
        return replace(self, functions=functions, pin_reason=reason)

    def example(self, **sizes: int) -> tuple[torch.Tensor, ...]:
        """Return one tensor of zeros an input; named dimensions not given are 1."""
        return tuple(
            torch.zeros(spec.static(**sizes).shape, dtype=_TORCH_DTYPES[spec.dtype])  # type: ignore[arg-type]
            for spec in self.inputs
        )

    def save(self, path: Path) -> None:
        """Write the program to a ``.pt2`` file, its functions to one each beside it.

        For a converter's child process.
        """
        for name, function in self.functions.items():
            function.save(_beside(path, name))
        header = {
            "model": self.model,
            "inputs": [s.to_json() for s in self.inputs],
            "outputs": [s.to_json() for s in self.outputs],
            "precision": self.precision.value,
            "labels": list(self.labels),
            "preprocessing": dict(self.preprocessing),
            "recipe_sha256": self.recipe_sha256,
            "functions": list(self.functions),
            "state": dict(self.state),
            "entry": self.entry,
        }
        # Through memory: torch's own file writer ends the process where the disk is full.
        buffer = io.BytesIO()
        extra = {"flowexport.json": json.dumps(header)}
        torch.export.save(self.exported, buffer, extra_files=extra)
        path.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path, ops: Sequence[AttentionDescriptor]) -> LoweredProgram:
        """Read a program written by :meth:`save`."""
        extra = {"flowexport.json": ""}
        exported = torch.export.load(path, extra_files=extra)
        header = json.loads(extra["flowexport.json"])
        inputs = tuple(TensorSpec.from_json(s) for s in header["inputs"])
        return cls(
            model=header["model"],
            exported=exported,
            inputs=inputs,
            outputs=tuple(TensorSpec.from_json(s) for s in header["outputs"]),
            precision=Precision(header["precision"]),
            attentions=find_attentions(exported, ops, _symbols(exported, inputs)),
            labels=tuple(header["labels"]),
            preprocessing=header["preprocessing"],
            recipe_sha256=header["recipe_sha256"],
            functions={n: cls.load(_beside(path, n), ops) for n in header["functions"]},
            state=header["state"],
            entry=header["entry"],
        )


def _beside(path: Path, function: str) -> Path:
    return path.with_name(f"{path.stem}.{function}{path.suffix}")


class _HalfInside(nn.Module):
    """A float16 model with float32 inputs and outputs; some inputs enter it as they are."""

    def __init__(self, model: nn.Module, wide: Sequence[bool]) -> None:
        super().__init__()
        self.half_inside = model.half()
        self.wide = list(wide)

    def forward(self, *inputs: torch.Tensor) -> Any:
        entering = [
            x.half() if x.is_floating_point() and not wide else x
            for x, wide in zip(inputs, self.wide, strict=True)
        ]
        result = self.half_inside(*entering)
        if isinstance(result, torch.Tensor):
            return result.float()
        return tuple(y.float() if y.dtype is torch.float16 else y for y in result)


def lower(
    model: nn.Module,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str],
    *,
    name: str,
    ops: Sequence[AttentionDescriptor],
    precision: Precision = Precision.FP32,
    labels: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    recipe_sha256: str = "",
    wide: Sequence[str] = (),
) -> LoweredProgram:
    """Export a model into an inference graph with each attention as one node.

    Args:
        model: any module; positional inputs in the order of ``inputs``. It is
            put into eval mode; for FP16 it is converted in place, so pass a copy.
        inputs: specs; a named dimension becomes dynamic.
        output_names: one name a result tensor.
        name: the model's name, for messages and files.
        ops: the attention operators to look for.
        precision: dtype inside; inputs and outputs stay as their specs say.
        labels, preprocessing, recipe_sha256: carried into the artifacts.
        wide: names of inputs that enter an FP16 model in float32 (a step's state).

    Raises:
        LoweringError: ``torch.export`` refused the model, or it has another
            number of results than names.
        InputError: the model does not take every size of a named dimension.
    """
    model = model.eval()
    if precision is Precision.FP16:
        model = _HalfInside(model, [s.name in wide for s in inputs]).eval()
    names = sorted({d for spec in inputs for d in spec.shape if isinstance(d, str)})
    dims = {n: torch.export.Dim(n, min=1, max=4096 if n == "batch" else 65536) for n in names}
    # Two in every dynamic dimension: torch.export specialises on 0 and 1.
    example = tuple(
        torch.zeros(spec.static(**dict.fromkeys(names, 2)).shape, dtype=_TORCH_DTYPES[spec.dtype])  # type: ignore[arg-type]
        for spec in inputs
    )
    per_input = tuple(
        {i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in inputs
    )
    parameters = signature(model.forward).parameters.values()
    # All of *inputs are one argument.
    variadic = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
    dynamic: Any = (per_input,) if variadic else per_input
    try:
        with torch.no_grad():
            exported = torch.export.export(
                model, example, dynamic_shapes=dynamic if names else None
            )
    except Exception as error:
        _check_sizes(error, name, inputs)
        raise LoweringError(
            f"lower {name}: torch.export refused the model: {_first_line(error)}",
            fix="make forward free of data-dependent control flow, or fix the input shapes",
        ) from error
    exported = clean(exported)
    values = _output_values(exported)
    if len(values) != len(output_names):
        raise LoweringError(
            f"lower {name}: the model has {len(values)} results;"
            f" expected {len(output_names)} ({', '.join(output_names)})."
        )
    symbols = _symbols(exported, inputs)
    outputs = tuple(
        TensorSpec(n, _shape(v, symbols), str(v.dtype).removeprefix("torch."))
        for n, v in zip(output_names, values, strict=True)
    )
    return LoweredProgram(
        model=name,
        exported=exported,
        inputs=tuple(inputs),
        outputs=outputs,
        precision=precision,
        attentions=find_attentions(exported, ops, symbols),
        labels=tuple(labels),
        preprocessing=dict(preprocessing or {}),
        recipe_sha256=recipe_sha256,
    )


def find_attentions(
    exported: ExportedProgram,
    ops: Sequence[AttentionDescriptor],
    symbols: Mapping[str, str] | None = None,
) -> tuple[AttentionSite, ...]:
    """Return every attention node of a graph, in execution order."""
    by_overload = {op.overload: op for op in ops}
    names = dict(symbols or {})
    sites = []
    for node in exported.graph.nodes:
        op = by_overload.get(node.target)
        if op is None:
            continue
        q, k, v = (_shape(arg.meta["val"], names) for arg in node.args[:3])
        arguments = tuple(list(a) if isinstance(a, (list, tuple)) else a for a in node.args[3:])
        sites.append(AttentionSite(op.name, module_path(node), q, k, v, arguments))
    return tuple(sites)


def decompose(
    program: LoweredProgram,
    target: str,
    ops: Sequence[AttentionDescriptor],
    *,
    pinned: str | None = None,
) -> tuple[LoweredProgram, tuple[Choice, ...]]:
    """Replace each attention node by the form that the target runs best.

    Before: ``linear -> flow_attention -> linear``. After: ``linear -> matmul,
    sigmoid, ... -> linear``, the other operators (linear, layer_norm, gelu) kept.

    Args:
        program: with attention nodes.
        target: whose table row decides.
        ops: the operators to decompose.
        pinned: a form that the recipe insists on, or None.

    Returns:
        The program without attention nodes, and the choice for each site.

    Raises:
        LoweringError: the pinned form does not exist, or a node is left.
    """
    by_name = {op.name: op for op in ops}
    sites = [s for s in program.attentions if s.op in by_name]
    choices = []
    for site in sites:
        op = by_name[site.op]
        if pinned is not None and pinned not in op.forms:
            raise LoweringError(
                f"lower {target} {program.model}: form is {pinned!r};"
                f" expected one of {sorted(op.forms)}."
            )
        choices.append(
            Choice(pinned, program.pin_reason)
            if pinned
            else op.choose(target, program.precision.value, site)
        )
    exported, misses = before_decomposition(
        program.exported, [op.overload for op in ops], [c.form for c in choices]
    )
    told = [c.told(m) for c, m in zip(choices, misses, strict=True)]
    kinds = {op.name: op.absorbing for op in ops}
    wanted = [
        (kind := kinds[s.op]) is not None and c.form in kind.forms
        for s, c in zip(sites, choices, strict=True)
    ]
    exported, misses = absorb_projections(
        exported, {op.overload: op.absorbing and op.absorbing.overload for op in ops}, wanted
    )
    told = [c.told(m) for c, m in zip(told, misses, strict=True)]
    absorbed = [w and m is None for w, m in zip(wanted, misses, strict=True)]
    table: dict[Any, Callable[..., Any]] = {}
    for op in ops:
        all_sites = zip(sites, choices, absorbed, strict=True)
        own = [(c.form, a) for s, c, a in all_sites if s.op == op.name]
        table[op.overload] = _in_turn(op.forms, [form for form, a in own if not a])
        if op.absorbing is not None:
            names = [form for form, a in own if a]
            table[op.absorbing.overload] = _in_turn(op.absorbing.forms, names)
    try:
        exported = after_decomposition(exported.run_decompositions(table))
    except InputError as error:  # the pinned form is not one for this variant
        raise LoweringError(
            f"lower {target} {program.model}: {error.message}", fix=error.fix
        ) from error
    if left := find_attentions(exported, ops):
        raise LoweringError(f"lower {target} {program.model}: {left[0].module_path} was kept.")
    return replace(program, exported=exported, attentions=()), tuple(told)


def _in_turn(forms: Mapping[str, Callable[..., Any]], names: Sequence[str]) -> Callable[..., Any]:
    """Return a function that computes each call in the next of the named forms."""
    remaining = iter(names)

    def compute(*args: Any) -> Any:
        return forms[next(remaining)](*args)

    return compute


def module_path(node: torch.fx.Node) -> str:
    """Return the PyTorch module path that a node came from (``encoder.layers.0.attention``)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("half_inside").removeprefix(".")


def _output_values(exported: ExportedProgram) -> list[Any]:
    node = next(n for n in exported.graph.nodes if n.op == "output")
    return [arg.meta["val"] for arg in node.args[0]]


def _symbols(exported: ExportedProgram, inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Map torch's symbols (``s77``) to the specs' dimension names."""
    wanted = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in wanted]
    result = {}
    for node, spec in zip(nodes, inputs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(dim, str):
                result[str(size)] = dim
    return result


def _shape(value: torch.Tensor, symbols: Mapping[str, str]) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else symbols.get(str(d), str(d)) for d in value.shape)


def _check_sizes(error: Exception, name: str, inputs: Sequence[TensorSpec]) -> None:
    """Raise InputError where torch.export found sizes that a dynamic dimension cannot have."""
    violated = re.match(r"Constraints violated \(([^)]*)\)", str(error).strip())
    if violated is None:
        return
    dimension = violated[1].split(",")[0].strip()
    guards = re.findall(r"the generated guard (.+?)\.?$", str(error), re.MULTILINE)
    told = f" (its condition: {'; '.join(guards)})" if guards else ""
    shapes = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in inputs)
    raise InputError(
        f"lower {name}: the inputs are {shapes}, but the model does not take every"
        f" {dimension!r}{told}; expected a number for that dimension.",
        fix=f"a number in the shape, or several as `buckets: {{{dimension}: [N, M]}}` in the recipe"
        if dimension != "batch"
        else "a number in the shape, or a forward independent of the batch size",
    ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
