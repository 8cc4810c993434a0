"""A causal model's programs: ``forward`` at static lengths, and ``step`` with its state."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowexport.core.errors import InputError
from flowexport.core.types import FORWARD, STEP, Precision, TensorSpec
from flowexport.lowering.lengths import forward_name, lower_each
from flowexport.lowering.program import LoweredProgram, lower
from flowexport.ops.descriptor import AttentionDescriptor

NEXT = "next_"
"""Prefix of the output that is a state input's next value."""


@runtime_checkable
class StreamingModule(Protocol):
    """What a causal module has beside ``forward``; see ``flowexport_models.streaming``."""

    max_steps: int | None

    def state_specs(self) -> tuple[TensorSpec, ...]: ...

    def initial_state(self, batch: int = 1, dtype: torch.dtype = ...) -> dict[str, Tensor]: ...

    def step(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]: ...


class StepModule(nn.Module):
    """``step`` with the state as inputs and outputs, in the order of its specs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        assert isinstance(model, StreamingModule)
        self.model = model
        self.names = [s.name for s in model.state_specs()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(self.names, inputs[1:], strict=True))
        result, following = self.model.step(inputs[0], state)
        return (result, *(following[n] for n in self.names))


def check_streaming(
    module: Any,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str],
    lengths: Sequence[int],
    where: str,
) -> None:
    """Refuse a model or lengths that cannot be exported step by step.

    Raises:
        InputError: the module has no ``step``, its ends are not one sequence in and one out,
            or a length is dynamic or beyond the model's longest stream.
    """
    if not isinstance(module, StreamingModule):
        raise InputError(
            f"{where}: streaming is asked for, but {type(module).__name__} has no step with a"
            " state; expected a causal model.",
            fix="drop `streaming`, or give the module state_specs, initial_state and step",
        )
    if len(inputs) != 1 or len(output_names) != 1 or len(inputs[0].shape) < 2:
        names = ", ".join(s.name for s in inputs)
        raise InputError(
            f"{where}: a causal model has the inputs {names} and the outputs"
            f" {', '.join(output_names)}; expected one sequence (batch, steps, ...) and one output."
        )
    (sequence,) = inputs
    if isinstance(sequence.shape[1], str):
        raise InputError(
            f"{where}: {sequence.name} has the dynamic length {sequence.shape[1]!r}; expected a"
            " fixed one.",
            fix="give each length a bucket of its own: `streaming: {lengths: [32, 1024]}`",
        )
    for length in (sequence.shape[1], *lengths):
        if module.max_steps is not None and length > module.max_steps:
            raise InputError(
                f"{where}: {sequence.name} has length {length};"
                f" expected at most {module.max_steps}, the model's longest stream."
            )


def lower_streaming(
    model: nn.Module,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str],
    *,
    lengths: Sequence[int] = (),
    name: str,
    ops: Sequence[AttentionDescriptor],
    precision: Precision = Precision.FP32,
    **carried: Any,
) -> LoweredProgram:
    """Export a causal model: ``forward``, ``forward_<length>`` for more lengths, and ``step``.

    Args:
        model: with ``step``, ``state_specs`` and ``initial_state``.
        inputs: one, (batch, L, ...); L is the length of ``forward``.
        output_names: one.
        lengths: more lengths of forward.
        precision: of the weights and activations. A step's state is float32 in FP16 too, and
            what moves it is computed in float32: a mean in half stops moving after about
            2,000 steps.
        carried: labels, preprocessing and recipe_sha256, as :func:`lower` has them.

    Returns:
        The program of ``forward``, the others in its ``functions``.

    Raises:
        InputError: as :func:`check_streaming`.
        LoweringError: ``torch.export`` refused the model.
    """
    check_streaming(model, inputs, output_names, lengths, f"lower {name}")
    (sequence,) = inputs

    def at(length: int) -> list[TensorSpec]:
        return [replace(sequence, shape=(sequence.shape[0], length, *sequence.shape[2:]))]

    frame = replace(sequence, shape=(sequence.shape[0], *sequence.shape[2:]))
    assert isinstance(model, StreamingModule)
    state = model.state_specs()
    step = lower(
        StepModule(copy.deepcopy(model)),
        [frame, *state],
        [*output_names, *(NEXT + s.name for s in state)],
        name=name,
        ops=ops,
        precision=precision,
        wide=[s.name for s in state],
        **carried,
    )
    step = replace(step, state={s.name: NEXT + s.name for s in state})
    first = int(sequence.shape[1])
    shapes = {FORWARD: at(first), **{forward_name(n): at(n) for n in lengths if n != first}}
    carried.update(name=name, ops=ops, precision=precision)
    forwards = lower_each(model, shapes, output_names, **carried)
    return replace(forwards.pop(FORWARD), functions={**forwards, STEP: step})


def state_nodes(program: LoweredProgram) -> frozenset[str]:
    """Return the names of a step's nodes that must stay float32 where the rest is half.

    They are those on a path from a state to its own next value (``mean + (x - mean) / t``), and
    those computed from states alone (``1 / t``). What a state is moved by may be half: it is
    near 1, and its rounding averages out. A program that is no step has none.
    """
    graph = program.exported.graph
    given = set(program.exported.graph_signature.user_inputs)
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name in given]
    output = next(n for n in graph.nodes if n.op == "output")
    entering = dict(zip((s.name for s in program.inputs), inputs, strict=True))
    leaving = dict(zip((s.name for s in program.outputs), output.args[0], strict=True))
    others = [n for n in inputs if n not in {entering[s] for s in program.state}]
    found: set[torch.fx.Node] = set()
    for name, following in program.state.items():
        found |= _reached([entering[name]], forward=True) & _reached(
            [leaving[following]], forward=False
        )
    from_state = _reached([entering[s] for s in program.state], forward=True)
    found |= from_state - _reached(others, forward=True)
    return frozenset(n.name for n in found if n.op == "call_function")


def _reached(starts: Sequence[torch.fx.Node], *, forward: bool) -> set[torch.fx.Node]:
    """Return what is computed from the nodes, or what they are computed from; themselves too."""
    found, waiting = set(starts), list(starts)
    while waiting:
        node = waiting.pop()
        for other in node.users if forward else node.all_input_nodes:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found
