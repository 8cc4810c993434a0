"""Numbers as people read them; what is unknown is a dash, never a zero."""

from __future__ import annotations

DASH = "–"


def number(value: float | int | None) -> str:
    """Return three significant digits, or exponents far from 1."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float | None) -> str:
    """Return a share (0..1) in percent."""
    return DASH if share is None else f"{100 * share:.2f} %"


def size(count: int | None) -> str:
    """Return bytes in the unit that fits."""
    if count is None:
        return DASH
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def closeness(cosine: float | None) -> str:
    """Return a cosine, or how far it is from 1 where digits would hide it."""
    if cosine is None:
        return DASH
    gap = 1 - cosine
    if gap < 1e-12:  # beyond what sums in float64 can tell
        return "1"
    return f"1 − {number(gap)}" if gap < 1e-4 else f"{cosine:.5f}"


def words(value: object) -> str:
    """Return a manifest's value in one line."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(words(v) for v in value) or DASH
    if isinstance(value, dict):
        return ", ".join(f"{k}: {words(v)}" for k, v in value.items()) or DASH
    return str(value)
