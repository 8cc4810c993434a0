"""What an app's package adds at a program's ends: probabilities, an input of another scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from flowexport.core.errors import InputError
from flowexport.core.types import TensorSpec
from flowexport.lowering.passes._edit import GraphEdit, argument, calls
from flowexport.lowering.program import LoweredProgram, module_path

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.convolution.default)


def add_probabilities(program: LoweredProgram, logits: str, name: str) -> LoweredProgram:
    """Add the softmax of one output's last axis as one more output.

    Args:
        program: decomposed.
        logits: an output of shape (..., classes), float.
        name: of the new output, of the same shape.
    """
    edit = GraphEdit(program.exported)
    index = [s.name for s in program.outputs].index(logits)
    source = edit.results[index]
    with edit.graph.inserting_after(source):
        edit.add_result(edit.call(_aten.softmax.int, source, -1, like=source))
    spec = replace(program.outputs[index], name=name)
    return replace(program, exported=edit.finish(), outputs=(*program.outputs, spec))


def divide_input(
    program: LoweredProgram, name: str, divisors: Sequence[float]
) -> tuple[LoweredProgram, str | None]:
    """Have the program divide an input by one number a channel, inside its first layer.

    ``conv(x / d, W) = conv(x, W / d)``: the zeros that a convolution pads with
    stay zeros. Where the input is not read by ungrouped convolutions alone, one
    multiplication is added instead.

    Args:
        program: decomposed; the input is (batch, channels, height, width).
        name: of the input, which then takes ``x * d``.
        divisors: one a channel, not zero.

    Returns:
        The program, and the module path of the first layer whose weights were
        divided; None where a multiplication was added.

    Raises:
        InputError: the input has another rank or number of channels.
    """
    spec = _image(program, name)
    if len(divisors) != spec.shape[1] or not all(math.isfinite(d) and d for d in divisors):
        raise InputError(
            f"lower {program.model}: {name} has {spec.shape[1]} channels; expected as many"
            f" divisors that are not zero (there are {list(divisors)})."
        )
    edit = GraphEdit(program.exported)
    node = edit.inputs[[s.name for s in program.inputs].index(name)]
    readers = list(node.users)
    scale = 1.0 / torch.tensor(list(divisors), dtype=torch.float64)
    if readers and all(_folds(edit, reader, node) for reader in readers):
        for reader in readers:
            weight = reader.args[1]
            assert isinstance(weight, Node)
            value = edit.weights[weight]
            divided = (value.double() * scale[:, None, None]).to(value.dtype)
            reader.update_arg(1, edit.parameter(weight, "divided", divided))
        # The readers' order is the graph's: the first one names the place.
        place: str | None = module_path(readers[0])
    else:
        constant = edit.parameter(None, f"{name}_scale", scale[:, None, None].float())
        with edit.graph.inserting_before(readers[0] if readers else node.next):
            scaled = edit.call(_aten.mul.Tensor, node, constant, like=node)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        place = None
    return replace(program, exported=edit.finish()), place


def _folds(edit: GraphEdit, reader: Node, image: Node) -> bool:
    if not calls(reader, *_CONVOLUTIONS) or reader.args[0] is not image:
        return False
    groups = argument(reader, 8 if calls(reader, _aten.convolution.default) else 6, 1)
    return groups == 1 and reader.args[1] in edit.weights


def _image(program: LoweredProgram, name: str) -> TensorSpec:
    spec = next((s for s in program.inputs if s.name == name), None)
    if spec is None or len(spec.shape) != 4:
        found = "x".join(map(str, spec.shape)) if spec else "missing"
        raise InputError(
            f"lower {program.model}: {name} has shape {found};"
            " expected (batch, channels, height, width)."
        )
    return spec
