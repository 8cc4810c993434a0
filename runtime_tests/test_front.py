"""The front of precisions: which are choices, and its picture."""

from __future__ import annotations

from flowexport.front import Point, _remarks


def point(precision: str, latency: float, sqnr: float, size: int, accuracy: float) -> Point:
    return Point(
        "onnx", precision, precision, size, "PASS", None, accuracy, 0.99, 370, 370, 1.0, sqnr,
        "native", latency, None,
    )  # fmt: skip


def test_the_front_names_choices_that_lose_twice() -> None:
    points = {
        p.precision: p
        for p in _remarks(
            [
                point("fp32", 1.0, 120, 400, 0.99),
                point("fp16", 1.0, 60, 200, 0.99),
                point("int8-dynamic", 0.6, 45, 100, 0.99),
                point("int8-weights", 1.5, 50, 100, 0.99),
                point("int8-static", 1.2, 30, 110, 0.98),
            ]
        )
    }
    assert points["int8-dynamic"].on_front and points["int8-dynamic"].remark is None
    assert not points["fp32"].on_front and not points["int8-weights"].on_front
    assert "50 against 60 dB" in str(points["int8-weights"].remark)
    assert "98.00 against 99.00 %" in str(points["int8-static"].remark)


def test_the_fronts_picture_labels_the_front_alone_and_covers_nothing() -> None:
    from flowexport.report.front import _WIDTHS, _Labels, render_front

    found = _remarks(
        [
            point("fp32", 1.0, 120, 400, 0.99),
            point("fp16", 1.0, 60, 200, 0.99),
            point("int8-dynamic", 0.6, 45, 100, 0.99),
            point("int8-weights", 1.5, 50, 100, 0.99),
        ]
    )
    rows = [p.__dict__ for p in found]
    page = render_front({"recipe": "<tiny>", "points": rows, "conditions": {}})
    first, second = page.split("Closeness and size")
    assert first.count('<text class="mark') == 1 and ">i8 dyn</text>" in first
    assert first.count("<circle") == 4 and "<tiny>" not in page
    # In closeness and size each is a choice of its own, but what has the size of a closer one.
    assert second.count('<text class="mark') == 3 and ">i8 dyn</text>" not in second

    crowd = [(50 + i % 5, 40 + i % 3, 8.0) for i in range(12)]
    labels = _Labels(crowd)
    marks = [labels.mark(i, "i8 stat", "t0") for i in range(6)]
    assert all(marks) and sum("<line" in mark for mark in marks) >= 4
    for width in _WIDTHS:
        boxes = labels._taken[width]
        for i, a in enumerate(boxes[len(crowd) :]):
            for b in [*boxes[: len(crowd)], *boxes[len(crowd) + i + 1 :]]:
                apart = a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
                own = b in boxes[: len(crowd)] and boxes.index(b) == i
                assert apart or own, (width, a, b)
