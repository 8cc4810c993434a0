"""Numbers of a file's constants, by which a changed one is told without knowing the others.

Outputs tell every damage of a float32 file. In half precision and in int8 a tolerance has to
be so wide that a scale off by one bit, or a zero point by one, hides in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

PERIOD = 1021
WIDE = (np.dtype(np.float32), np.dtype(np.float64))
INDEX = (np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.bool_))


def stored(constants: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the :func:`moments` of all constants of a file that stores some in few bits.

    A file of float32 weights alone gives nothing. Shapes, axes and biases of integer
    products (int32, int64) do not make a file one of few bits, but are told of one that is.
    """
    few = any(v.dtype not in (*WIDE, *INDEX) and v.size > 1 for v in constants.values())
    if not few:
        return {}
    # JSON knows no infinity, which a mask may hold.
    finite = {
        n: np.nan_to_num(v.astype(np.float64), nan=7e99, posinf=8e99, neginf=-8e99)
        for n, v in constants.items()
    }
    return {n: [v.size, *moments(v)] for n, v in finite.items() if v.size}


def changed(
    have: Mapping[str, Sequence[float]], wanted: Mapping[str, Sequence[float]]
) -> list[str]:
    """Return one line for each constant whose numbers are not those wanted."""
    problems = []
    for name in sorted({*have, *wanted}):
        ours, theirs = have.get(name), wanted.get(name)
        if ours is None or theirs is None:
            state = "missing" if ours is None else "not one that the manifest has"
            problems.append(f"weight {name} is {state}")
        elif ours[0] != theirs[0] or not same_moments(ours[1:], theirs[1:], int(theirs[0])):
            problems.append(
                f"weight {name} has count, sum, squares and ramp {_listed(ours)};"
                f" expected {_listed(theirs)}"
            )
    return problems


def moments(values: np.ndarray) -> list[float]:
    """Return the sum, the sum of squares, and a sum that depends on the order, in float64."""
    flat = values.astype(np.float64).ravel()
    ramp = (np.arange(flat.size) % PERIOD + 1) / PERIOD
    with np.errstate(over="ignore", invalid="ignore"):
        return [float(flat.sum()), float(np.square(flat).sum()), float((flat * ramp).sum())]


def same_moments(have: Sequence[float], wanted: Sequence[float], count: int) -> bool:
    """Whether moments agree but for the rounding of float64 sums."""
    if len(have) != len(wanted):
        return False
    spread = float(np.sqrt(count * wanted[1]))
    scales = (spread, wanted[1], spread)
    return all(
        a == b or abs(a - b) <= 1e-9 * s for a, b, s in zip(have, wanted, scales, strict=True)
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.9g}" for v in values)
