"""How the constants and the functions' graphs of a format's files are reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mutants import Change

SHORT, LONG, STEP = "forward_16", "forward_29", "step"
STATES = ("next_layer0_k_mean", "next_layer0_q_mean")
"""Two of a step's state outputs that have one shape."""

Values = Callable[[np.ndarray], np.ndarray]


def double(values: np.ndarray) -> np.ndarray:
    return values * np.asarray(2, values.dtype)


def following(values: np.ndarray) -> np.ndarray:
    return values + np.asarray(1, values.dtype)


def negate_row(values: np.ndarray) -> np.ndarray:
    result = values.copy()
    result[1] = -result[1]
    return result


def grow(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32) * 1.01).astype(values.dtype)


def thousandfold(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.astype(np.float32) * 1000).astype(values.dtype)


@dataclass(frozen=True)
class Reach:
    """How a format's files are changed; every callable takes the artifact's path last.

    Attributes:
        weight: changes the stored values of one quantised or half matrix of a function.
        scale: changes that matrix's scales.
        zero_point: changes the zero point of one activation.
        exchange: puts the graph of each length under the other's name.
        swap: exchanges two outputs of a function.
        keep: makes a step give back its first state as it came.
        epsilon: makes a function's small constants larger by what they are times a thousand.
    """

    weight: Callable[[str, Values, Path], None]
    scale: Callable[[str, Values, Path], None]
    zero_point: Callable[[str, Path], None]
    exchange: Change
    swap: Callable[[str, tuple[str, str], Path], None]
    keep: Change
    epsilon: Callable[[str, Path], None]
