"""Which layers a quantised precision treats how: named rules, the same for every target.

The attention core (everything inside an attention node: sums over all tokens and
their quotients) is no weighted layer and stays in floating point always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError
from flowexport.core.ranges import PROBE
from flowexport.core.types import Precision, TensorSpec
from flowexport.lowering.layers import Layer


class Treatment(StrEnum):
    """What happens to one layer.

    ``integer``: weights and activations in 8 bits, an integer product;
    ``weights``: weights in few bits, widened before a product in floating point;
    ``float``: nothing.
    """

    INTEGER = "integer"
    WEIGHTS = "weights"
    FLOAT = "float"


@dataclass(frozen=True)
class Decision:
    """How one layer is treated, by which rule, and why."""

    path: str
    treatment: Treatment
    rule: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "treatment": self.treatment.value,
            "rule": self.rule,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Quantisation:
    """What was done to a file, and what was found when it was read back.

    Attributes:
        decisions: one a layer, in execution order.
        found: module path -> what the finished file does there.
        calibration: name and number of the samples, or None.
        half: number of constants beside the layers that are stored in half, and bytes saved.
        clipping: case to be verified -> what the calibrated ranges clip of it (see
            :meth:`flowexport.core.ranges.Clipping.worst`); empty where nothing was calibrated.
    """

    decisions: tuple[Decision, ...]
    found: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    half: Mapping[str, int] | None = None
    clipping: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [{**d.to_json(), "found": self.found[d.path]} for d in self.decisions],
            "calibration": self.calibration,
            **({} if self.half is None else {"half": dict(self.half)}),
        }


def matches(path: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern that names a module path, or a module around it."""
    for pattern in patterns:
        if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*"):
            return pattern
    return None


def decide(
    layers: Sequence[Layer],
    precision: Precision,
    keep: Sequence[str],
    *,
    where: str,
    integer_convolutions: bool = True,
    dynamic_depthwise: bool = True,
) -> tuple[Decision, ...]:
    """Return the treatment of every layer, in execution order.

    Args:
        keep: module paths or globs that stay in floating point.
        where: the start of a message.
        integer_convolutions: whether the target gains by integer convolutions.
        dynamic_depthwise: whether it has depthwise ones whose activations are rounded at run time.

    Raises:
        ConversionError: a pattern of ``keep`` names no layer, or nothing would be quantised.
    """
    for pattern in keep:
        if not any(matches(layer.path, [pattern]) for layer in layers):
            raise ConversionError(
                f"{where}: keep_float has {pattern!r}, which names no linear or convolution layer;"
                f" expected one of: {', '.join(layer.path for layer in layers)}.",
                fix="mend the recipe's `keep_float`",
            )
    decisions = []
    # A fused layer that lowering split is there in parts, which are treated alike.
    layers = list({layer.path: layer for layer in layers}.values())
    for i, layer in enumerate(layers):
        kept = matches(layer.path, keep)
        ends = i in (0, len(layers) - 1)
        if kept:
            told = (Treatment.FLOAT, "kept", f"keep_float names {kept}")
        elif precision not in (Precision.INT8_DYNAMIC, Precision.INT8_STATIC):
            told = (Treatment.WEIGHTS, "weights", f"{precision.value} stores weights only")
        elif precision is Precision.INT8_STATIC and ends:
            end = "reads the model's input" if i == 0 else "gives the model's scores"
            told = (Treatment.WEIGHTS, "ends", f"{end}: a fixed range would clip what is unusual")
        elif precision is Precision.INT8_STATIC and layer.kind in ("convolution", "depthwise"):
            why = "few of the products and, where it makes the tokens, most of what ranges clip"
            told = (Treatment.WEIGHTS, "convolution", why)
        elif layer.kind != "linear" and not integer_convolutions:
            told = (Treatment.WEIGHTS, "convolution", "slower in integers than in floating point")
        elif (
            layer.kind == "depthwise"
            and precision is Precision.INT8_DYNAMIC
            and not dynamic_depthwise
        ):
            told = (Treatment.WEIGHTS, "depthwise", "no accelerated form takes float activations")
        else:
            told = (Treatment.INTEGER, "linear", "its product is where the time goes")
        decisions.append(Decision(layer.path, *told))
    if all(d.treatment is Treatment.FLOAT for d in decisions):
        raise ConversionError(
            f"{where}: keep_float keeps all {len(layers)} layers; expected at least one to"
            f" quantise to {precision.value}.",
            fix="--precision fp16, or a shorter `keep_float`",
        )
    return tuple(decisions)


def read_samples(path: Path, inputs: Sequence[TensorSpec]) -> tuple[str, Mapping[str, np.ndarray]]:
    """Return a calibration set's name and one array an input, samples first.

    The samples have the longest bucket's length. A shorter one is calibrated on their
    beginnings: on each sequence that it holds, and on the first steps of each that is
    longer, so that it has as many samples however few are short.

    Args:
        path: written by :func:`flowexport.calibration.write_samples`.
        inputs: of the program that is calibrated.
    """
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        name = str((file.metadata() or {}).get("name", path.stem))
        return name, {s.name: _beginning(file.get_tensor(s.name), s) for s in inputs}


def read_probes(path: Path, function: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Return the cases that a function will be verified on: case -> input -> array.

    Args:
        path: written by :func:`flowexport.calibration.write_samples`.
        function: one more length's; the main one's where empty.
    """
    from safetensors import safe_open

    found: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(path, "numpy") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            if not key.startswith(f"{PROBE}/"):
                continue
            _, owner, rest = key.split("/", 2)
            case, name = rest.rsplit("/", 1)
            if owner == function:
                found.setdefault(case, {})[name] = file.get_tensor(key)
    return found


def rows(feeds: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yield samples one by one, as feeds of batch 1."""
    for i in range(len(next(iter(feeds.values())))):
        yield {name: np.ascontiguousarray(values[i : i + 1]) for name, values in feeds.items()}


def _beginning(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Return samples cut to the static sizes of a spec."""
    sizes = (slice(n if isinstance(n, int) else None) for n in spec.shape[1:])
    return np.ascontiguousarray(values[(slice(None), *sizes)])


def treatment_of(paths: Iterable[str], decisions: Sequence[Decision]) -> Treatment:
    """Return how an operator is treated whose weight is that of these layers.

    A merge of layers of which one is kept is kept whole.
    """
    wanted = {d.treatment for d in decisions if d.path in set(paths)}
    return next(t for t in reversed(Treatment) if t in wanted)


def prove(
    decisions: Sequence[Decision],
    found: Mapping[str, str],
    operators: Mapping[str, Sequence[str]],
    where: str,
) -> None:
    """Raise ConversionError unless a finished file does at every layer what its rule says.

    Args:
        found: module path -> ``integer``, ``weights``, ``float`` or another word, as read back.
        operators: name of each weighted operator -> the layers it stands for.
    """
    merged = {
        p: treatment_of(parts, decisions)
        for parts in operators.values()
        if len(parts) > 1
        for p in parts
    }
    for d in decisions:
        wanted = merged.get(d.path, d.treatment).value
        if found.get(d.path) != wanted:
            raise ConversionError(
                f"{where}: layer {d.path} is {found.get(d.path, 'missing')} in the finished file;"
                f" expected {wanted} by the rule {d.rule!r} ({d.reason}).",
                fix="--precision fp16, or another `form`",
            )
