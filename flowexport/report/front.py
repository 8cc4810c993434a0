"""front.html: accuracy, latency and size of every precision on every target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flowexport.report import svg
from flowexport.report.format import number, percent, size
from flowexport.report.html import render_page

TARGETS = ("onnx", "tflite", "coreml", "tensorrt")
_SHORT = {
    "int8-dynamic": "i8 dyn",
    "int8-static": "i8 stat",
    "int8-weights": "i8 w",
    "palette8": "pal8",
    "palette6": "pal6",
    "palette4": "pal4",
}
_HEIGHT = 330
_WIDTHS = (310, 500, 700, 1030)
"""Pixels of a plot on a phone 390 wide, and up to the page's widest."""
_Box = tuple[float, float, float, float]


def render_front(document: Mapping[str, Any]) -> str:
    """Render the page of a ``front.json``.

    Every string is escaped; the plots' markup alone is not.
    """
    from markupsafe import Markup

    points = [_row(p) for p in document["points"]]
    timed = [p for p in points if p["latency_ms"] is not None]
    judged = any(p["accuracy"] is not None for p in points)
    values = {
        "name": document["recipe"],
        "judged": judged,
        "points": sorted(points, key=lambda p: (p["order"], -p["size_bytes"])),
        "targets": [
            {"name": t, "kind": f"t{_order(t)}"} for t in dict.fromkeys(p["target"] for p in points)
        ],
        "latency": Markup(_scatter(timed, "latency_ms", "median latency, ms", judged)),
        "sizes": Markup(_scatter(points, "size_mib", "size, MiB", False)),
        "remarks": [(p["name"], p["remark"]) for p in points if p["remark"]],
        "unmeasured": sorted(
            {(p["target"], p["not_measured"]) for p in points if p["not_measured"]}
        ),
        "conditions": _conditions(document["conditions"]),
        "failed": sum(p["verdict"] == "FAIL" for p in points),
        "on_front": [p["name"] for p in points if p["on_front"]],
        "samples": next((p["samples"] for p in points if p["samples"]), None),
        "reference": next((percent(p["reference_accuracy"]) for p in points), None),
    }
    return render_page("front.html", values)


def _order(target: str) -> int:
    return TARGETS.index(target) if target in TARGETS else len(TARGETS)


def _row(point: Mapping[str, Any]) -> dict[str, Any]:
    p = dict(point)
    return {
        **p,
        "name": f"{p['target']} {p['precision']}",
        "order": _order(p["target"]),
        "short": _SHORT.get(p["precision"], p["precision"]),
        "size_mib": p["size_bytes"] / 2**20,
        "size": size(p["size_bytes"]),
        "accuracy_text": percent(p["accuracy"]),
        "same": "–" if p["samples"] is None else f"{p['agreement']} of {p['samples']}",
        "p_text": "–" if p["p_value"] is None else f"{p['p_value']:.2g}",
        "sqnr": "exact" if p["sqnr_db"] is None else f"{p['sqnr_db']:.0f}",
        "latency": number(p["latency_ms"]),
    }


def _scatter(points: Sequence[Mapping[str, Any]], key: str, label: str, judged: bool) -> str:
    """Draw points over a horizontal value; up is closer to PyTorch.

    Up is the accuracy on the evaluation set where ``judged``, else the SQNR.
    Areas grow with the file's size.
    """
    if not points:
        return ""
    xs = [float(p[key]) for p in points]
    wide = max(xs) / min(xs) > 4
    across = svg.Axis(min(xs) / 1.25, max(xs) * 1.35, log=True) if wide else _around(xs)
    heights = [_height(p, judged) for p in points]
    up = _around(heights, 0.5 if judged else 4.0)
    biggest = max(p["size_bytes"] for p in points)
    body = _grid(across, up, judged)
    places = [
        (
            _x(across.at(float(p[key]))),
            _y(100 - up.at(y)),
            4 + 9 * math.sqrt(p["size_bytes"] / biggest),
        )
        for p, y in zip(points, heights, strict=True)
    ]
    best = _front(
        {
            i: (float(p[key]), y)
            for i, (p, y) in enumerate(zip(points, heights, strict=True))
            if p["verdict"] != "FAIL"
        }
    )
    labels, marks = _Labels(places), ""
    for i in sorted(range(len(points)), key=lambda i: -points[i]["size_bytes"]):
        p, (left, top, radius) = points[i], places[i]
        text = f"{p['name']}: {number(p[key])} {label.rsplit(', ')[-1]}, {p['size']}, "
        text += p["accuracy_text"] if judged else f"{p['sqnr']} dB"
        kind = f"point t{p['order']}" + (" front" if p["on_front"] else "")
        kind += " failed" if p["verdict"] == "FAIL" else ""
        body += (
            f'<circle class="{kind}" cx="{left}%" cy="{top}%" r="{radius:.1f}">'
            f"<title>{escape(text)}</title></circle>"
        )
        if p["on_front"] if key == "latency_ms" else i in best:
            marks += labels.mark(i, p["short"], f"t{p['order']}")
    body += marks
    title = f"{'accuracy' if judged else 'SQNR'} over {label}, {len(points)} points"
    return (
        f'<svg class="plot scatter" width="100%" height="{_HEIGHT}" role="img"'
        f' aria-label="{escape(title, quote=True)}">{body}'
        f'<text class="tick" x="100%" y="{_HEIGHT - 4}" text-anchor="end">{escape(label)}</text>'
        "</svg>"
    )


def _height(p: Mapping[str, Any], judged: bool) -> float:
    if judged:
        return 100 * float(p["accuracy"] or 0.0)
    return float(p["sqnr_db"]) if p["sqnr_db"] is not None else 150.0


def _around(values: Sequence[float], least: float = 0.0) -> svg.Axis:
    low, high = min(values), max(values)
    room = max((high - low) * 0.18, least, abs(high) * 0.002, 1e-9)
    return svg.Axis(low - room, high + room)


def _x(share: float) -> float:
    return round(9 + share * 0.89, 2)


def _y(share: float) -> float:
    return round(3 + share * 0.84, 2)


def _grid(across: svg.Axis, up: svg.Axis, judged: bool) -> str:
    unit = " %" if judged else " dB"
    body, last = "", -math.inf
    for tick in across.ticks():
        x = _x(across.at(tick))
        body += f'<line class="grid" x1="{x}%" x2="{x}%" y1="3%" y2="87%"/>'
        if x - last >= 12 and x < 92:
            last = x
            body += (
                f'<text class="tick" x="{x}%" y="{_HEIGHT * 0.87 + 15:.0f}"'
                f' text-anchor="middle">{tick:g}</text>'
            )
    for tick in up.ticks():
        y = _y(100 - up.at(tick))
        body += f'<line class="grid" x1="9%" x2="98%" y1="{y}%" y2="{y}%"/>'
        body += f'<text class="tick" x="0" y="{y}%" dy="4">{tick:g}{unit}</text>'
    return body


def _front(places: Mapping[int, tuple[float, float]]) -> set[int]:
    """Return which (across, up) no other beats: as far left and as far up, and farther in one."""
    return {
        i
        for i, (x, y) in places.items()
        if not any(a <= x and b >= y and (a < x or b > y) for a, b in places.values())
    }


class _Labels:
    """Places labels so that they cover neither each other nor a point, however wide the plot.

    Points stand at percentages, texts keep their pixels.
    """

    def __init__(self, points: Sequence[tuple[float, float, float]]) -> None:
        """
        Args:
            points: left and top in percent of the plot, radius in pixels.
        """
        self._points = points
        self._taken: dict[int, list[_Box]] = {
            width: [
                (
                    x * width / 100 - r,
                    y * _HEIGHT / 100 - r,
                    x * width / 100 + r,
                    y * _HEIGHT / 100 + r,
                )
                for x, y, r in points
            ]
            for width in _WIDTHS
        }

    def mark(self, index: int, text: str, kind: str) -> str:
        """Return the label of a point, with a line to it where it had to move; empty: no room."""
        left, top, radius = self._points[index]
        wide = 6.3 * len(text)
        for down in (0, *(sign * 14 * n for n in range(1, 15) for sign in (-1, 1))):
            for side in (1, -1):
                away = side * (radius + 4 + min(abs(down) / 4, 10))
                boxes = {
                    w: self._box(w, left, top + 100 * down / _HEIGHT, away, wide) for w in _WIDTHS
                }
                if all(self._free(w, box, index) for w, box in boxes.items()):
                    for width, box in boxes.items():
                        self._taken[width].append(box)
                    line = (
                        f'<line class="lead {kind}" x2="{away:.0f}" y2="{down}"/>' if down else ""
                    )
                    anchor = "end" if side < 0 else "start"
                    return (
                        f'<svg x="{left}%" y="{top}%" overflow="visible">{line}'
                        f'<text class="mark {kind}" x="{away:.0f}" y="{down + 4}"'
                        f' text-anchor="{anchor}">{escape(text)}</text></svg>'
                    )
        return ""

    @staticmethod
    def _box(width: int, left: float, top: float, away: float, wide: float) -> _Box:
        x, y = left * width / 100 + away, top * _HEIGHT / 100
        return (x - wide if away < 0 else x, y - 7, x if away < 0 else x + wide, y + 7)

    def _free(self, width: int, box: _Box, index: int) -> bool:
        low, upper, high, lower = box
        if low < 0.09 * width or high > width + 8 or upper < 0 or lower > 0.87 * _HEIGHT:
            return False
        return not any(
            low < b[2] and b[0] < high and upper < b[3] and b[1] < lower
            for i, b in enumerate(self._taken[width])
            if i != index
        )


def _conditions(found: Mapping[str, Any]) -> str | None:
    if not found:
        return None
    cpu = found["machine"].get("cpu") or "an unknown CPU"
    threads = found["threads"]
    return (
        f"{cpu}, {threads} thread{'' if threads == 1 else 's'}, {found['iterations']} rounds of one"
        f" run each, load {number(found['load_before'])} before and"
        f" {number(found['load_after'])} after."
    )
