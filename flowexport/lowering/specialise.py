"""A program with a fixed batch and float32 inside, for converters that need either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flowexport.core.errors import InputError, LoweringError
from flowexport.core.types import TensorSpec
from flowexport.lowering.program import LoweredProgram, find_attentions
from flowexport.ops.descriptor import AttentionDescriptor


def check_static(inputs: Sequence[TensorSpec], where: str, fix: str) -> None:
    """Refuse dynamic dimensions other than the batch, before any long work.

    Args:
        inputs: of the model or of its program.
        where, fix: begin and end of the message.

    Raises:
        InputError: an input has a named dimension that is not ``batch`` in front.
    """
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and (axis, size) != (0, "batch"):
                raise InputError(
                    f"{where}: {spec.name} has dynamic dimension {size!r} (axis {axis});"
                    " expected fixed sizes apart from the batch.",
                    fix=fix,
                )


def specialise(
    program: LoweredProgram, ops: Sequence[AttentionDescriptor], *, batch: int = 1
) -> LoweredProgram:
    """Export again with a fixed batch, and with float32 in place of float16 inside.

    A converter that stores half precision itself (fp16 weights in TFLite, the
    compute precision of Core ML) starts from float32 operators. The weights
    stay those of ``program``: widening float16 is exact.

    Args:
        program: with attention nodes or without.
        ops: the attention operators to look for.
        batch: size of the ``batch`` dimension.

    Returns:
        The program with a static batch; other named dimensions stay dynamic, and
        ``precision`` is kept as asked for.

    Raises:
        LoweringError: ``torch.export`` refused the batch.
    """
    module = program.exported.module(check_guards=False)
    if not isinstance(module, torch.fx.GraphModule):
        raise LoweringError(f"lower {program.model}: the exported program has no graph module.")
    _widen(module)
    names = {d for s in program.inputs for d in s.shape if isinstance(d, str)} - {"batch"}
    dims = {n: torch.export.Dim(n, min=1, max=65536) for n in sorted(names)}
    dynamic = tuple(
        {i: dims[d] for i, d in enumerate(s.shape) if d in dims} for s in program.inputs
    )
    # Two in every dynamic dimension: torch.export specialises on 0 and 1.
    example = program.example(batch=batch, **dict.fromkeys(names, 2))
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module, example, dynamic_shapes=dynamic if names else None
            )
    except Exception as error:
        raise LoweringError(
            f"lower {program.model}: torch.export refused batch {batch}:"
            f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            fix="make forward independent of the batch size",
        ) from error
    found = find_attentions(exported, ops)
    return replace(
        program,
        exported=exported,
        inputs=tuple(_of_batch(s, batch) for s in program.inputs),
        outputs=tuple(_of_batch(s, batch) for s in program.outputs),
        # The module paths come from the first export; a second one knows the graph only.
        attentions=tuple(
            replace(site, module_path=old.module_path)
            for site, old in zip(found, program.attentions, strict=True)
        ),
    )


def _of_batch(spec: TensorSpec, batch: int) -> TensorSpec:
    return replace(spec, shape=tuple(batch if d == "batch" else d for d in spec.shape))


def _widen(module: torch.fx.GraphModule) -> None:
    """Replace float16 by float32 in a graph's tensors and in its operators' arguments."""

    def wide(value: Any) -> Any:
        return torch.float32 if value is torch.float16 else value

    # New tensors, not new data: the module shares its own with the program.
    for owner in module.modules():
        stores: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, vars(owner))
        for store in stores:
            for name, value in list(store.items()):
                if isinstance(value, torch.nn.Parameter) and value.dtype is torch.float16:
                    store[name] = torch.nn.Parameter(value.detach().float(), requires_grad=False)
                elif isinstance(value, torch.Tensor) and value.dtype is torch.float16:
                    store[name] = value.float()
    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, wide)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, wide)
    module.recompile()
