"""Finds where a finished file's values leave the reference's, without knowing its names.

A converter renames, fuses, splits and turns tensors. So each value of the
reference is looked for among the file's values of as many elements, in every
order of its axes. A reference value that the file does not hold is no damage as
long as something computed from it is right; the first one from which nothing
right follows is where the file goes wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from flowexport.core.findings import finite

NEAREST = 8
"""Candidates that are compared value by value, the nearest by their moments."""
SAMPLES = 512
"""Values on which an order of the axes is tried."""
MOST_AXES = 5
FLOOR = 2.0**-23


@dataclass(frozen=True)
class Value:
    """One result of an operator in a finished file; its array is float."""

    name: str
    op_type: str
    array: np.ndarray


@dataclass(frozen=True)
class Step:
    """One operator of the reference.

    Attributes:
        name: in the exported graph.
        module: PyTorch module path.
        operator: e.g. ``aten.linear``.
        value: float64.
        inputs: names of the steps that it reads.
        part: whether it is a piece of its input only (a slice, one of a split).
    """

    name: str
    module: str
    operator: str
    value: np.ndarray
    inputs: tuple[str, ...]
    part: bool = False


@dataclass(frozen=True)
class Compared:
    """A step beside the file's nearest value.

    Attributes:
        error: ``max|a - r| / max|r|``; None where the file has no value of its size, or
            none that is finite.
        found, op_type: name and operator of that value in the file.
        within: whether the error is within the tolerance.
        right: whether it is, or something that is within was computed from it: the file
            folded the step into its readers, and the error is that of another value.
    """

    name: str
    module: str
    operator: str
    error: float | None
    found: str | None = None
    op_type: str | None = None
    within: bool = False
    right: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": finite(self.error)}


@dataclass(frozen=True)
class Bisection:
    """What comparing all values of one case gave.

    Attributes:
        function: of the artifact.
        case: name of the function's case.
        tolerance: ``max_rel`` that every value is held to.
        output_error: largest of the file's outputs, as it was run.
        first: the first step that leaves the tolerance for good; None where none does.
        jump: the step whose error grows most against its inputs', where that is tenfold.
        fused: steps between the last right one and ``first`` that the file does not hold.
    """

    function: str
    case: str
    tolerance: float
    output_error: float
    steps: tuple[Compared, ...]
    first: Compared | None = None
    jump: Compared | None = None
    fused: tuple[str, ...] = field(default=())

    @property
    def healthy(self) -> bool:
        return self.output_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {
            "function": self.function,
            "case": self.case,
            "tolerance": self.tolerance,
            "output_error": finite(self.output_error),
            "healthy": self.healthy,
            "first": None if self.first is None else self.first.to_json(),
            "jump": None if self.jump is None else self.jump.to_json(),
            "fused": list(self.fused),
            "steps": [s.to_json() for s in self.steps],
        }


def bisect(
    steps: Sequence[Step],
    values: Sequence[Value],
    *,
    function: str,
    case: str,
    tolerance: float,
    output_error: float,
) -> Bisection:
    """Compare a file's values with the reference's.

    Args:
        steps: in execution order.
        values: of the finished file on the same inputs.
        output_error: largest relative error of the file's outputs.
    """
    shelf: dict[int, list[tuple[Value, np.ndarray]]] = {}
    for value in values:
        if value.array.size:
            shelf.setdefault(value.array.size, []).append((value, _moments(value.array)))
    compared = {step.name: _nearest(step, shelf, tolerance) for step in steps}
    right = _right(steps, compared)
    compared = {name: replace(found, right=right[name]) for name, found in compared.items()}
    first = jump = None
    fused: tuple[str, ...] = ()
    if output_error > tolerance or not np.isfinite(output_error):
        wrong = [s for s in steps if not right[s.name]]
        held = [s for s in wrong if compared[s.name].found is not None]
        if held:
            first = compared[held[0].name]
            fused = tuple(s.name for s in wrong[: wrong.index(held[0])])
        jump = _largest_jump(steps, compared)
    told = tuple(compared.values())
    return Bisection(function, case, tolerance, output_error, told, first, jump, fused)


def _right(steps: Sequence[Step], compared: Mapping[str, Compared]) -> dict[str, bool]:
    """Say of each step whether its value is right, or something right was computed from it."""
    readers: dict[str, list[Step]] = {s.name: [] for s in steps}
    for step in steps:
        for name in step.inputs:
            if name in readers:
                readers[name].append(step)
    right: dict[str, bool] = {}
    for step in reversed(steps):
        whole = [s for s in readers[step.name] if not s.part]
        parts = [s for s in readers[step.name] if s.part]
        right[step.name] = (
            compared[step.name].within
            or any(right[s.name] for s in whole)
            or (bool(parts) and all(right[s.name] for s in parts))
        )
    return right


def _largest_jump(steps: Sequence[Step], compared: Mapping[str, Compared]) -> Compared | None:
    best, growth = None, 10.0
    for step in steps:
        mine = compared[step.name].error
        theirs = [compared[n].error for n in step.inputs if n in compared]
        known = [e for e in theirs if e is not None]
        if mine is None or len(known) < len(theirs) or step.part or compared[step.name].right:
            continue
        ratio = mine / max(FLOOR, *known) if known else mine / FLOOR
        if ratio > growth:
            best, growth = compared[step.name], ratio
    return best


def _moments(array: np.ndarray) -> np.ndarray:
    """Return what no order of the axes changes, for a first choice of candidates."""
    flat = array.astype(np.float64).ravel()
    if not np.isfinite(flat).all():
        return np.full(4, np.inf)
    return np.array([flat.mean(), np.abs(flat).mean(), flat.max(), flat.min()])


def _nearest(
    step: Step, shelf: Mapping[int, Sequence[tuple[Value, np.ndarray]]], tolerance: float
) -> Compared:
    peak = float(np.abs(step.value).max()) or 1.0
    wanted = _moments(step.value)
    near = sorted(
        shelf.get(step.value.size, ()),
        key=lambda pair: float(np.abs(pair[1] - wanted).max()),
    )
    best: tuple[float, Value] | None = None
    for value, moments in near[:NEAREST]:
        error = float("inf")
        if np.isfinite(moments).all():
            error = _difference(step.value, value.array) / peak
        if best is None or error < best[0]:
            best = (error, value)
        if error <= FLOOR:
            break
    if best is None:
        return Compared(step.name, step.module, step.operator, None)
    error, value = best
    broken = [v for v, moments in near if not np.isfinite(moments).all()]
    if error > tolerance and broken:
        error, value = float("inf"), broken[0]
    return Compared(
        step.name, step.module, step.operator, finite(error), value.name, value.op_type,
        error <= tolerance,
    )  # fmt: skip


def _difference(reference: np.ndarray, array: np.ndarray) -> float:
    """Return the largest difference under the order of axes that fits best."""
    kept = reference.reshape([d for d in reference.shape if d != 1] or [1])
    flat = array.astype(np.float64).ravel()
    places = np.unique(np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int64))
    orders = (
        itertools.permutations(range(kept.ndim)) if kept.ndim <= MOST_AXES else [range(kept.ndim)]
    )
    best, chosen = float("inf"), None
    for order in orders:
        turned = kept.transpose(tuple(order))
        index = np.unravel_index(places, turned.shape)
        error = float(np.abs(turned[index] - flat[places]).max())
        if error < best:
            best, chosen = error, turned
    if chosen is None:
        return float("inf")
    return float(np.abs(chosen.ravel() - flat).max())
