"""Plot rows as inline SVG without a view box.

Horizontal positions are percentages and text keeps its size, so that a row is
as readable on a phone as on a desk. Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from flowexport.core.findings import OUTSIDE
from flowexport.core.types import Verdict

MAX_MARKS = 400
"""Raw samples drawn in a strip; beyond that evenly chosen ranks, first and last included."""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale; positions are percent of the row's width."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            span = math.log10(self.high) - math.log10(self.low)
            share = (math.log10(value) - math.log10(self.low)) / span
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = {1: (1, 2, 5), 2: (1, 3), 3: (1, 3)}.get(last - first, (1,))
            every = max(1, round((last - first) / 6))
            ticks = [m * 10.0**e for e in range(first, last + 1, every) for m in steps]
            return [t for t in ticks if self.low <= t <= self.high]
        raw = (self.high - self.low) / 4
        size = 10 ** math.floor(math.log10(raw))
        step_size = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
        start = math.ceil(self.low / step_size)
        return [i * step_size for i in range(start, int(self.high / step_size) + 1)]


def error_axis(values: Sequence[float], limits: Sequence[float]) -> Axis:
    """Return the decades that hold all errors and tolerances."""
    known = [v for v in (*values, *limits) if v > 0]
    low, high = (min(known), max(known)) if known else (1e-8, 1.0)
    return Axis(
        10.0 ** (math.floor(math.log10(low) - 0.2)),
        10.0 ** math.ceil(math.log10(high) + 0.15),
        log=True,
    )


def time_axis(samples: Sequence[float]) -> Axis:
    """Return a scale from 0, or a logarithmic one where the times differ more than twelvefold."""
    known = [s for s in samples if s > 0]
    if not known:
        return Axis(0.0, 1.0)
    low, high = min(known), max(known)
    if high / low > 12:
        return Axis(low / 1.2, high * 1.2, log=True)
    return Axis(0.0, high * 1.04)


def grid(axis: Axis) -> str:
    """Return the vertical lines of a row."""
    return "".join(
        f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>'
        for x in map(axis.at, axis.ticks())
    )


def axis_row(axis: Axis, unit: str = "") -> str:
    """Return the tick labels below the rows."""
    labels: list[str] = []
    last = -math.inf
    for tick in axis.ticks():
        x = axis.at(tick)
        if x - last < 16:  # labels would touch on a phone
            continue
        last = x
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        labels.append(
            f'<text class="tick" x="{x}%" y="13" text-anchor="{anchor}">'
            f"{escape(_tick(tick))}</text>"
        )
    label = f"scale in {unit}" if unit else "scale"
    return _row("".join(labels), 18, label)


KINDS = {Verdict.PASS.value: "good", Verdict.FAIL.value: "bad", OUTSIDE: "open"}
"""How the dot of a comparison looks, by its verdict."""


def dots(axis: Axis, marks: Sequence[tuple[float, str, str]], limit: float, label: str) -> str:
    """Return dots of errors against a tolerance.

    Args:
        marks: (error, ``good``, ``bad`` or ``open``, what it is) each; 0 stands at the left end.
    """
    edge = axis.at(limit)
    body = f'<rect class="allowed" x="0" y="0" width="{edge}%" height="100%"/>' + grid(axis)
    body += f'<line class="limit" x1="{edge}%" x2="{edge}%" y1="0" y2="100%"/>'
    for value, state, title in marks:
        kind = "dot" if state == "good" else f"dot {state}"
        body += (
            f'<circle class="{kind}" cx="{axis.at(value)}%" cy="50%" r="4.5">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _row(body, 24, label)


def bar(share: float, kind: str, label: str) -> str:
    """Return one bar from 0; ``share`` is its length, 0..1."""
    width = round(100 * min(max(share, 0.0), 1.0), 2)
    body = '<rect class="rail" x="0" y="5" width="100%" height="14" rx="3"/>'
    body += f'<rect class="bar {kind}" x="0" y="5" width="{width}%" height="14" rx="3"/>'
    return _row(body, 24, label)


def strip(axis: Axis, samples: Sequence[float], label: str) -> str:
    """Return raw samples as dots, the box from p25 to p75, and the median as a line."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    p25, p50, p75, p90, p99 = (float(p) for p in np.percentile(values, [25, 50, 75, 90, 99]))
    body = grid(axis)
    if len(values) > MAX_MARKS:
        values = values[np.linspace(0, len(values) - 1, MAX_MARKS).round().astype(int)]
    heights = 8 + 24 * ((np.arange(len(values)) * 0.6180339887) % 1.0)  # even, not random
    for value, y in zip(values, heights, strict=True):
        body += f'<circle class="sample" cx="{axis.at(float(value))}%" cy="{y:.1f}" r="2"/>'
    left, right = axis.at(p25), axis.at(p75)
    body += (
        f'<rect class="box" x="{left}%" y="6" width="{max(right - left, 0.4):.2f}%" height="28" '
        f'rx="2"/><line class="median" x1="{axis.at(p50)}%" x2="{axis.at(p50)}%" y1="2" y2="38"/>'
    )
    for value, name in ((p90, "p90"), (p99, "p99")):
        x = axis.at(value)
        body += (
            f'<line class="tail" x1="{x}%" x2="{x}%" y1="12" y2="28"><title>{name}</title></line>'
        )
    return _row(body, 40, label)


def _row(body: str, height: int, label: str) -> str:
    return (
        f'<svg class="plot" width="100%" height="{height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{body}</svg>'
    )


def _tick(value: float) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
