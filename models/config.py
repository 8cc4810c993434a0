"""Checks that the families' configurations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowexport.core.errors import InputError


def check_int(family: str, name: str, value: Any, *, low: int = 1) -> None:
    """Raise InputError unless ``value`` is an integer >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"build {family}: {name} is {value!r}; expected an integer >= {low}.")


def check_ints(family: str, name: str, values: Any, *, count: int | None = None) -> None:
    """Raise InputError unless ``values`` is a sequence of ``count`` positive integers."""
    many = f"{count} " if count is not None else ""
    if (
        isinstance(values, str)
        or not isinstance(values, Sequence)
        or not values
        or (count is not None and len(values) != count)
        or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values)
    ):
        raise InputError(
            f"build {family}: {name} is {values!r}; expected a list of {many}positive integers."
        )


def check_number(family: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise InputError unless ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(
            f"build {family}: {name} is {value!r}; expected a number from {low:g} to {high:g}."
        )


def check_choice(family: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(
            f"build {family}: {name} is {value!r}; expected one of: {', '.join(choices)}."
        )


def check_heads(family: str, width_name: str, width: int, n_heads: int) -> None:
    """Raise InputError unless the heads divide the channels."""
    if width % n_heads:
        raise InputError(
            f"build {family}: {width_name} is {width} with {n_heads} heads;"
            " expected a multiple of the head count."
        )


def clamp_bounds(family: str, value: Any) -> tuple[float, float] | None:
    """Return the bounds of the conserved source flow, or raise InputError."""
    if value is None:
        return None
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    if not numbers or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise InputError(f"build {family}: clamp is {value!r}; expected [low, high] or null.")
    low, high = float(value[0]), float(value[1])
    if not low < high:
        raise InputError(f"build {family}: clamp is {value!r}; expected low < high.")
    return low, high
