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
    taken: list[tuple[float, float]] = []
    for p, y in sorted(zip(points, heights, strict=True), key=lambda pair: -pair[0]["size_bytes"]):
        left, top = across.at(float(p[key])), 100 - up.at(y)
        radius = 4 + 9 * math.sqrt(p["size_bytes"] / biggest)
        text = f"{p['name']}: {number(p[key])} {label.rsplit(', ')[-1]}, {p['size']}, "
        text += p["accuracy_text"] if judged else f"{p['sqnr']} dB"
        kind = f"point t{p['order']}" + (" front" if p["on_front"] else "")
        kind += " failed" if p["verdict"] == "FAIL" else ""
        body += (
            f'<circle class="{kind}" cx="{_x(left)}%" cy="{_y(top)}%" r="{radius:.1f}">'
            f"<title>{escape(text)}</title></circle>"
        )
        offset = _free(left, top, taken)
        side = "end" if left > 70 else "start"
        shift = -(radius + 3) if side == "end" else radius + 3
        body += (
            f'<text class="mark t{p["order"]}" x="{_x(left)}%" y="{_y(top)}%" dx="{shift:.0f}"'
            f' dy="{4 + offset}" text-anchor="{side}">{escape(p["short"])}</text>'
        )
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


def _free(left: float, top: float, taken: list[tuple[float, float]]) -> int:
    """Return how many pixels to move a label down so that it covers no other."""
    for offset in (0, 13, -13, 26, -26, 39, -39, 52):
        place = top + offset * 100 / (_HEIGHT * 0.84)
        if all(abs(left - x) > 13 or abs(place - y) > 4.2 for x, y in taken):
            taken.append((left, place))
            return offset
    return 0


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
