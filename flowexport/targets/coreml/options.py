"""The Core ML target's own settings (``Options.extra``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, Precision, TensorSpec

PRECISIONS = (
    Precision.FP32,
    Precision.FP16,
    Precision.INT8_STATIC,
    Precision.INT8_WEIGHTS,
    Precision.PALETTE8,
    Precision.PALETTE6,
    Precision.PALETTE4,
)
PALETTES = PRECISIONS[-3:]
DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18")
COMPUTE_UNITS = {
    "all": "ALL",
    "cpu_only": "CPU_ONLY",
    "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_and_ne": "CPU_AND_NE",
}
LAYOUTS = ("tokens", "ane")
STATES = ("half", "split")
FUNCTIONS, STATE = "several functions in a package", "a state inside the package"
ENUMERATED = "several inputs of enumerated shapes"
GROUPS = "a palette for a group of channels"
ACTIVATIONS = "activations in 8 bits"
FIRST_SYSTEM = {
    FUNCTIONS: "iOS18",
    STATE: "iOS18",
    ENUMERATED: "iOS18",
    GROUPS: "iOS18",
    ACTIVATIONS: "iOS17",
}
"""What a package may hold -> the first deployment target that has it; iOS16 has all else."""


@dataclass(frozen=True)
class Metadata:
    """What the package says of itself to people; texts, empty where nobody said them.

    Attributes:
        version: the recipe's hash where empty.
        inputs, outputs: what a named input or output holds.
        user: the author's own entries.
    """

    author: str = ""
    license: str = ""
    description: str = ""
    version: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    user: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CoreMLOptions:
    """Settings of one conversion and of the session that runs its result.

    Attributes:
        form: the attention form to use at every site; None lets lowering choose.
        deployment_target: the oldest system that the package must run on; None
            takes the first that has all that the package holds.
        compute_units: what Core ML may run it on.
        classifier: whether the package tells label and probabilities beside the scores.
        image: whether its input is an 8-bit image, the preprocessing inside.
        flexible: dimension -> inclusive range, or the sizes allowed.
        keep_fp32: in fp16, what stays in float32: operator types (``softmax``),
            globs of module paths (``blocks.0.*``), ``attention``.
        stateful: ``half`` or ``split``: a causal model has ``step_stateful`` too, whose state
            is inside, see :mod:`~flowexport.targets.coreml.stateful`; None: it has not.
        layout: ``tokens``, or ``ane``: (batch, channels, 1, tokens) with 1x1 convolutions.
        palette_group: output channels that share a palette; None: all of a layer.
        metadata: see :class:`Metadata`.
    """

    form: str | None = None
    deployment_target: str | None = None
    compute_units: str = "all"
    classifier: bool = False
    image: bool = False
    flexible: Mapping[str, Any] = field(default_factory=dict)
    keep_fp32: tuple[str, ...] = ()
    stateful: str | None = None
    layout: str = "tokens"
    palette_group: int | None = None
    metadata: Metadata = field(default_factory=Metadata)

    @classmethod
    def parse(cls, options: Options) -> CoreMLOptions:
        """Return the settings in ``options``.

        Raises:
            InputError: the precision or a value is not supported, two options
                exclude each other, or the deployment target lacks something.
            UnknownNameError: a key, deployment target, compute unit or layout is not known.
        """
        where = "convert coreml"
        if options.precision not in PRECISIONS:
            raise InputError(
                f"{where}: precision is {str(options.precision)!r};"
                f" expected one of: {', '.join(PRECISIONS)}."
            )
        known = [f.name for f in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in options.extra.items():
            if key not in known:
                raise UnknownNameError("option", key, known, where=where)
            values[key] = _READERS[key](value, f"{where}: {key}")
        settings = cls(**values)
        for kind, name, valid in (
            ("deployment target", settings.deployment_target, DEPLOYMENT_TARGETS),
            ("compute unit", settings.compute_units, tuple(COMPUTE_UNITS)),
            ("layout", settings.layout, LAYOUTS),
            ("kind of state", settings.stateful, STATES),
        ):
            if name is not None and name not in valid:
                raise UnknownNameError(kind, name, valid, where=where)
        if settings.keep_fp32 and options.precision is Precision.FP32:
            raise InputError(
                f"{where}: keep_fp32 is {list(settings.keep_fp32)}, but the precision is fp32;"
                " expected a half one.",
                fix="--precision fp16, or drop keep_fp32",
            )
        if settings.stateful:
            settings.system(where, STATE)
        if settings.palette_group and options.precision not in PALETTES:
            raise InputError(
                f"{where}: palette_group is {settings.palette_group}, but the precision is"
                f" {options.precision.value}; expected one of: {', '.join(PALETTES)}."
            )
        if settings.palette_group:
            settings.system(where, GROUPS)
        if options.precision is Precision.INT8_STATIC:
            settings.system(where, ACTIVATIONS)
        if settings.flexible and settings.image:
            raise InputError(
                f"{where}: image and flexible are both asked for; expected one of them: these"
                " models' images have one size."
            )
        return settings

    @property
    def largest(self) -> dict[str, int]:
        """The largest size of each flexible dimension."""
        return {name: max(n for v in limits.values() for n in v)
                for name, limits in self.flexible.items()}  # fmt: skip

    def held(
        self, inputs: Sequence[TensorSpec], several: bool, precision: Precision
    ) -> tuple[str, ...]:
        """Return what a package of these inputs holds: keys of :data:`FIRST_SYSTEM`."""
        enumerated = any("sizes" in limits for limits in self.flexible.values())
        return (
            *([FUNCTIONS] if several else []),
            *([STATE] if self.stateful else []),
            *([GROUPS] if self.palette_group else []),
            *([ENUMERATED] if enumerated and len(inputs) > 1 else []),
            *([ACTIVATIONS] if precision is Precision.INT8_STATIC else []),
        )

    def system(self, where: str, *held: str) -> str:
        """Return the deployment target of a package that holds these things.

        Args:
            held: keys of :data:`FIRST_SYSTEM`.

        Raises:
            InputError: an older one was asked for.
        """
        order = DEPLOYMENT_TARGETS.index
        needed = max((FIRST_SYSTEM[h] for h in held), key=order, default=DEPLOYMENT_TARGETS[0])
        asked = self.deployment_target
        if asked is None or order(asked) >= order(needed):
            return asked or needed
        what = next(h for h in held if FIRST_SYSTEM[h] == needed)
        raise InputError(
            f"{where}: deployment_target is {asked}; expected {needed}, the first with {what}.",
            fix=f"deployment_target: {needed}, or drop what needs it",
        )


def _name(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        raise InputError(f"{where} is {value!r}; expected a name.")
    return value


def _optional_name(value: Any, where: str) -> Any:
    return None if value is None else _name(value, where)


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where} is {value!r}; expected true or false.")
    return value


def _names(value: Any, where: str) -> tuple[str, ...]:
    fits = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    if not fits or not value or len(set(value)) < len(value):
        raise InputError(f"{where} is {value!r}; expected a list of different names.")
    return tuple(value)


def _sizes(value: Any, where: str) -> dict[str, Any]:
    """Read ``{length: {range: [8, 64]}}`` or ``{length: {sizes: [16, 29, 64]}}``."""
    example = "expected {length: {range: [8, 64]}} or {length: {sizes: [16, 29]}}."
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InputError(f"{where} is {value!r}; {example}")
    for name, limits in value.items():
        kind = next(iter(limits), None) if isinstance(limits, Mapping) and len(limits) == 1 else ""
        if not isinstance(name, str) or kind not in ("range", "sizes"):
            raise InputError(f"{where} is {value!r}; {example}")
        numbers = limits[kind]
        rising = isinstance(numbers, (list, tuple)) and list(numbers) == sorted(set(numbers))
        positive = rising and all(type(n) is int and n > 0 for n in numbers)
        count = len(numbers) if rising else 0
        if not positive or (kind == "range" and count != 2) or count < 2:
            words = "two lengths" if kind == "range" else "two lengths or more"
            raise InputError(
                f"{where}: {kind} is {numbers!r}; expected {words} above 0, increasing."
            )
    return {k: {n: list(v) for n, v in limits.items()} for k, limits in value.items()}


def _metadata(value: Any, where: str) -> Metadata:
    known = {f.name: f for f in fields(Metadata)}
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {value!r}; expected a mapping with: {', '.join(known)}.")
    for key, text in value.items():
        if key not in known:
            raise UnknownNameError("metadata key", str(key), known, where=where)
        table = key in ("inputs", "outputs", "user")
        texts = list(text.values()) if table and isinstance(text, Mapping) else [text]
        if not all(isinstance(t, str) and t for t in texts) or (table != isinstance(text, Mapping)):
            wanted = "names with texts" if table else "a text"
            raise InputError(f"{where}: {key} is {text!r}; expected {wanted}.")
    return Metadata(**value)


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"{where} is {value!r}; expected a whole number above 0.")
    return value


_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "form": _optional_name,
    "deployment_target": _name,
    "compute_units": _name,
    "classifier": _switch,
    "image": _switch,
    "flexible": _sizes,
    "keep_fp32": _names,
    "stateful": _name,
    "layout": _name,
    "palette_group": _count,
    "metadata": _metadata,
}
