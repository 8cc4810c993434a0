"""A causal model's step with its state inside the package (Core ML's StateType, iOS 18).

Core ML's states are float16. ``half`` stores each state as such, and a mean
stops moving after some 2,000 steps. ``split`` stores the value and what the
rounding left of it, two float16 numbers of 11 bits each: 22 bits, nearly the
24 of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowexport.core.errors import ConversionError, InputError
from flowexport.core.types import STEP
from flowexport.lowering import LoweredProgram

FUNCTION = "step_stateful"
STEPS, MARKS = 4096, (64, 256, 1024, 4096)
SEED = 0
MODE = "fp16"
"""Of the interpreter: ``exact`` would not round the states."""


class _Stateful(nn.Module):
    """``step`` whose state is buffers; one result the fewer for each."""

    def __init__(self, step: LoweredProgram, split: bool) -> None:
        super().__init__()
        self.step = step.exported.module(check_guards=False)
        self.split = split
        self.names = list(step.state)
        for spec in step.inputs:
            if spec.name in step.state:
                shape = [int(d) for d in spec.shape]
                self.register_buffer(f"state_{spec.name}", torch.zeros(shape))
                if split:
                    self.register_buffer(f"rest_{spec.name}", torch.zeros(shape))
        self.results = len(step.outputs) - len(self.names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        state = []
        for name in self.names:
            value = self.get_buffer(f"state_{name}")
            state.append(value + self.get_buffer(f"rest_{name}") if self.split else value)
        results = self.step(*inputs, *state)
        for name, value in zip(self.names, results[self.results :], strict=True):
            if self.split:
                rounded = value.half().float()
                self.get_buffer(f"rest_{name}").copy_(value - rounded)
                value = rounded
            self.get_buffer(f"state_{name}").copy_(value)
        return tuple(results[: self.results])


def require_step(program: LoweredProgram) -> None:
    """Raise InputError unless the program has a causal model's step."""
    if STEP not in program.functions:
        raise InputError(
            f"convert coreml {program.model}: stateful is asked for, but the model has no step;"
            " expected a causal model.",
            fix="drop `stateful`, or `streaming: true` in the recipe",
        )


def stateful_step(step: LoweredProgram, kind: str) -> LoweredProgram:
    """Return a step whose state is mutable buffers.

    Args:
        step: decomposed, batch 1; its state inputs come last, its next state too, and
            the reset state is zeros.
        kind: ``half`` or ``split``.
    """
    inputs = tuple(s for s in step.inputs if s.name not in step.state)
    following = set(step.state.values())
    example = tuple(torch.zeros([int(d) for d in s.shape]) for s in inputs)
    with torch.no_grad():
        exported = torch.export.export(_Stateful(step, kind == "split"), example)
    return replace(
        step,
        exported=exported,
        inputs=inputs,
        outputs=tuple(s for s in step.outputs if s.name not in following),
        state={},
    )


@dataclass(frozen=True)
class Drift:
    """How far the package's own state leads it away.

    Attributes:
        marks: (steps so far, largest error of the last 64 steps over the largest value),
            of the interpreted package against torch with an explicit float32 state.
    """

    kind: str
    marks: tuple[tuple[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "function": FUNCTION,
            "state": self.kind,
            "drift": [list(m) for m in self.marks],
            "execution": "interpreted",
            "mode": MODE,
            "inputs": f"standard normal, seed {SEED}",
        }


def measure_drift(
    path: Path,
    step: LoweredProgram,
    kind: str,
    *,
    function: str | None = FUNCTION,
    steps: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Drift:
    """Run the finished package's stateful step on the interpreter, beside torch.

    What the package declares float16 is rounded to that, in a float32 package the states.

    Args:
        path: of the package.
        step: the explicit one, decomposed, batch 1.
        function: of the package; None where it has one alone.
        steps: of the stream; :data:`STEPS` where None.
        tell: called with (steps done, steps) now and then.

    Raises:
        ConversionError: the package's step has no state, or a result is not finite.
    """
    from flowexport.targets.coreml.interpreter import Interpreter

    steps = steps or STEPS
    interpreter = Interpreter(path, mode=MODE, function=function)
    where = f"convert coreml {step.model}: {FUNCTION}"
    if not interpreter.operators["coreml_update_state"] or not interpreter.operators["read_state"]:
        raise ConversionError(f"{where} has no state in the finished package; expected some.")
    (spec,) = (s for s in step.inputs if s.name not in step.state)
    output = step.outputs[0].name
    module = step.exported.module(check_guards=False)
    held = [s for s in step.inputs if s.name in step.state]
    state = [torch.zeros([int(d) for d in s.shape]) for s in held]
    states = interpreter.new_states()
    rng = np.random.default_rng(SEED)
    errors, peak = np.zeros(steps), 0.0
    with torch.no_grad():
        for t in range(steps):
            x = rng.standard_normal([int(d) for d in spec.shape]).astype(np.float32)
            found = interpreter.run({spec.name: x}, states=states)[output]
            results = module(torch.from_numpy(x), *state)
            state = list(results[len(results) - len(held) :])
            want = results[0].numpy()
            errors[t] = np.abs(found.astype(np.float64) - want).max()
            peak = max(peak, float(np.abs(want).max()))
            if tell is not None and t % 256 == 0:
                tell(t, steps)
    if not np.isfinite(errors).all():
        first = int(np.argmin(np.isfinite(errors)))
        raise ConversionError(f"{where} is not finite at step {first}; expected finite values.")
    marks = [m for m in MARKS if m <= steps] or [steps]
    told = tuple((m, float(errors[max(0, m - 64) : m].max()) / (peak or 1.0)) for m in marks)
    return Drift(kind, told)
