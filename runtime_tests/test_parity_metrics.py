"""The metrics: their definitions, their invariances, and the rules at the edges."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flowexport.core.errors import RecipeError, UnknownNameError
from flowexport.core.ranges import Clipping
from flowexport.core.reports import CaseResult, ParityReport, Tolerance
from flowexport.core.stored import changed, stored
from flowexport.core.types import Verdict
from flowexport.parity import compare

SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 6))
VALUES = st.floats(-1e6, 1e6, width=32)
LOOSE = Tolerance(max_rel=1.0, reason="test")


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    actual = draw(arrays(np.float32, shape, elements=VALUES))
    return actual, draw(arrays(np.float64, shape, elements=VALUES))


def test_definitions_on_numbers_worked_out_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 0.0]])
    actual = np.array([[3.0, 4.5], [0.0, 0.0]], dtype=np.float32)
    found = compare("c", "o", actual, reference)
    assert found.max_abs == 0.5
    assert found.max_rel == 0.125
    assert found.relative_l2 == pytest.approx(0.1)
    assert found.sqnr_db == pytest.approx(20.0)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert (found.rows, found.top1_matches) == (2, 2)
    assert found.peak == 4.0 and not found.exact


@settings(deadline=None)
@given(pairs())
def test_ranges_and_json(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = compare("c", "o", *pair)
    assert found.problem is None
    assert found.max_abs is not None and found.max_abs >= 0
    assert found.max_rel is not None and found.max_rel >= 0
    assert found.cosine is None or -1 <= found.cosine <= 1
    assert 0 <= found.top1_matches <= found.rows == len(pair[0])
    json.dumps(found.to_json(LOOSE), allow_nan=False)


@settings(deadline=None)
@given(pairs())
def test_equal_values_are_exact_and_others_are_not(pair: tuple[np.ndarray, np.ndarray]) -> None:
    actual, reference = pair
    same = compare("c", "o", actual, actual.astype(np.float64))
    assert same.exact and same.max_rel == 0 and same.top1_agreement == 1
    assert same.sqnr_db is None
    assert same.cosine == pytest.approx(1.0)
    assert compare("c", "o", actual, reference).exact == np.array_equal(actual, reference)


@settings(deadline=None)
@given(pairs(), st.integers(-10, 10))
def test_relative_metrics_do_not_see_the_scale(
    pair: tuple[np.ndarray, np.ndarray], power: int
) -> None:
    actual, reference = pair
    actual, reference = np.round(actual), np.round(reference)  # so that scaling is exact
    one = compare("c", "o", actual, reference)
    two = compare("c", "o", actual * np.float32(2.0**power), reference * 2.0**power)
    if one.peak:
        assert two.max_rel == pytest.approx(one.max_rel)
        assert two.relative_l2 == pytest.approx(one.relative_l2)
    if one.cosine is not None:
        assert two.cosine == pytest.approx(one.cosine, abs=1e-9)


@settings(deadline=None)
@given(pairs())
def test_sqnr_follows_from_relative_l2(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = compare("c", "o", *pair)
    if found.sqnr_db is not None and found.relative_l2:
        assert 10 ** (-found.sqnr_db / 20) == pytest.approx(found.relative_l2)


def test_huge_and_tiny_values_neither_overflow_nor_vanish() -> None:
    for scale in (1e-30, 1e30):
        reference = np.array([[1.0, -2.0]]) * scale
        found = compare("c", "o", (reference * (1 + 1e-3)).astype(np.float32), reference)
        assert found.max_rel == pytest.approx(1e-3, rel=1e-3)
        assert found.cosine == pytest.approx(1.0)
        assert found.sqnr_db == pytest.approx(60, abs=0.1)


def test_all_zero_reference_is_held_to_the_absolute_error() -> None:
    zero = np.zeros((1, 3))
    same = compare("c", "o", zero.astype(np.float32), zero)
    assert same.exact and same.cosine == 1.0 and same.violation(LOOSE) is None
    near = compare("c", "o", np.full((1, 3), 1e-3, np.float32), zero)
    assert near.max_rel == near.max_abs == pytest.approx(1e-3)
    assert near.cosine is None and near.sqnr_db is None
    assert near.violation(Tolerance(max_rel=1e-4, reason="test")) is not None
    assert near.violation(Tolerance(max_rel=1e-2, reason="test", min_cosine=0.9)) is None


def test_all_zero_result_fails_the_cosine() -> None:
    found = compare("c", "o", np.zeros((1, 3), np.float32), np.full((1, 3), 0.5))
    limits = Tolerance(max_rel=1.0, reason="test", min_cosine=0.0)
    assert found.cosine is None
    assert "cosine" in str(found.violation(limits))


@pytest.mark.parametrize(
    ("actual", "reference", "word"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2)), "shape"),
        (np.zeros((1, 3), np.float32), np.zeros((2, 3)), "shape"),
        (np.zeros((2, 3), np.float64), np.zeros((2, 3)), "dtype"),
        (np.zeros((2, 3), np.float16), np.zeros((2, 3)), "dtype"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3)), "no values"),
        (np.array([[np.nan, 1]], np.float32), np.ones((1, 2)), "not finite"),
        (np.array([[np.inf, 1]], np.float32), np.ones((1, 2)), "not finite"),
        (np.ones((1, 2), np.float32), np.array([[np.nan, 1]]), "not finite"),
    ],
)
def test_what_cannot_be_compared_never_passes(
    actual: np.ndarray, reference: np.ndarray, word: str
) -> None:
    found = compare("c", "o", actual, reference)
    assert found.problem is not None and word in found.problem
    assert found.violation(LOOSE) is not None
    assert found.to_json(LOOSE)["verdict"] == "FAIL"


def test_ties_in_the_reference_count_for_either_class() -> None:
    reference = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = compare("c", "o", np.array([[1, 2, 0], [0, 2, 0]], np.float32), reference)
    assert (found.rows, found.top1_matches) == (2, 1)


def test_only_rows_of_scores_have_a_top1() -> None:
    cube = np.ones((2, 3, 4))
    assert compare("c", "o", cube.astype(np.float32), cube).top1_agreement is None
    column = np.ones((2, 1))
    assert compare("c", "o", column.astype(np.float32), column).top1_agreement is None


@pytest.mark.parametrize(
    "bad",
    [
        {"max_rel": 1e-3},
        {"reason": "why"},
        {"max_rel": 1e-3, "reason": " "},
        {"max_rel": -1, "reason": "why"},
        {"max_rel": float("nan"), "reason": "why"},
        {"max_rel": "0.1", "reason": "why"},
        {"max_rel": None, "reason": "why"},
        {"max_rel": True, "reason": "why"},
        {"max_rel": 1e-3, "reason": "why", "min_cosine": 2},
        {"max_rel": 1e-3, "reason": "why", "max_accuracy_drop": -0.5},
    ],
)
def test_a_tolerance_that_means_nothing_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Tolerance.from_json(bad)


def test_a_misspelt_limit_is_refused_with_the_right_one() -> None:
    with pytest.raises(UnknownNameError, match="max_rel"):
        Tolerance.from_json({"maxrel": 1e-3, "reason": "why"})


def test_tolerance_round_trip() -> None:
    limits = Tolerance(max_rel=1e-3, reason="why", min_sqnr_db=40, max_accuracy_drop=0.5)
    assert Tolerance.from_json(json.loads(json.dumps(limits.to_json()))) == limits


FAR = CaseResult("large", "y", max_abs=0.9, max_rel=0.9, cosine=0.2, peak=1.0, rows=1,
                 clipped=0.8, layer="l.2 input", stretch=12.0)  # fmt: skip


def test_a_drawn_case_outside_the_calibrated_ranges_is_not_judged() -> None:
    limits = Tolerance(max_rel=0.3, reason="test", min_cosine=0.99)
    assert FAR.violation(limits) is None
    told = FAR.to_json(limits)
    assert told["verdict"] == "OUTSIDE" and told["max_rel"] == 0.9
    assert "l.2 input clips 80 % of the values" in told["reason"]
    assert "12 times its calibrated range" in told["reason"]
    assert CaseResult.from_json(json.loads(json.dumps(told))) == FAR
    # Inside, or of a file without ranges: judged as any other. What is not finite fails everywhere.
    for inside in (replace(FAR, clipped=0.3), replace(FAR, clipped=None)):
        assert inside.to_json(limits)["verdict"] == "FAIL"
    assert "not finite" in str(replace(FAR, problem="not finite").violation(limits))


def test_real_samples_outside_the_calibrated_ranges_fail() -> None:
    limits = Tolerance(max_rel=0.3, reason="test")
    good = replace(FAR, max_abs=0.0, max_rel=0.0, cosine=1.0, top1_matches=1)
    for case in ("sample-4", "forward_16/sample-4", "evaluation/set", "f/evaluation/set"):
        reason = str(replace(good, case=case).violation(limits))
        assert "expected at most 30 % of real samples" in reason
        assert replace(good, case=case, clipped=0.29).violation(limits) is None


def test_too_few_cases_inside_the_calibrated_ranges_fail() -> None:
    limits = Tolerance(max_rel=0.3, reason="test", min_top1_agreement=1.0)
    inside = CaseResult("sample-1", "y", max_abs=0.1, max_rel=0.1, cosine=1.0, peak=1.0, rows=1,
                        top1_matches=1, clipped=0.0, layer="l.2 input", stretch=1.0)  # fmt: skip
    cases = (FAR, inside, replace(inside, case="zeros"))

    def report(*cases: CaseResult) -> ParityReport:
        expected = tuple((c.case, c.output) for c in cases)
        return ParityReport("x", "0", "0", limits, "r", expected, cases, runtime={})

    few = report(*cases)
    assert few.verdict is Verdict.FAIL
    assert few.problems == (
        "2 of 3 cases lie inside the calibrated ranges; expected at least 3 to judge",
    )
    enough = report(*cases, replace(inside, case="random-0"))
    assert enough.verdict is Verdict.PASS and enough.max_rel == 0.1 and enough.top1_agreement == 1
    assert enough.summary()["outside"] == ["large"]
    assert ParityReport.from_json(json.loads(json.dumps(enough.to_json()))) == enough


def test_clipping_tells_the_range_that_takes_most() -> None:
    clipping = Clipping({"a": (-1.0, 1.0), "b": (0.0, 6.0), "flat": (0.0, 0.0)})
    assert clipping.worst() == {}
    clipping.look("a", np.array([0.5, -1.0], np.float32))
    assert clipping.worst() == {"layer": "a", "clipped": 0.0, "stretch": 1.0}
    clipping.look("b", np.array([9.0, 0.0]))
    clipping.look("b", np.array([-3.0, 3.0]))
    # 3 and -3 are lost of 9, -3 and 3; [-3, 9] is twice as wide as [0, 6].
    assert clipping.worst() == {"layer": "b", "clipped": round(np.sqrt(18 / 99), 6), "stretch": 2.0}
    clipping.look("flat", np.array([np.nan, 1.0]))
    assert clipping.worst() == {"layer": "flat", "clipped": 1.0, "stretch": 1e9}


# Numbers of stored constants.


def test_stored_numbers_tell_each_change_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    held = {
        "w": rng.integers(-127, 128, (4, 6)).astype(np.int8),
        "scale": rng.random(4).astype(np.float32),
        "mask": np.array([0, -np.inf], np.float16),
    }
    wanted = json.loads(json.dumps(stored(held), allow_nan=False))
    assert changed(stored(held), wanted) == []
    assert stored({"w": held["scale"], "shape": np.array([4, 6])}) == {}, "float32 alone"
    flipped, moved, scaled = held["w"].copy(), held["w"].copy(), held["scale"].copy()
    flipped[1, 2] ^= 1
    moved[[0, 1]] = moved[[1, 0]]
    scaled[3] *= np.float32(1 + 2**-20)
    for name, value in (("w", flipped), ("w", moved), ("scale", scaled)):
        (line,) = changed(stored({**held, name: value}), wanted)
        assert line.startswith(f"weight {name} has count, sum")
    assert changed(stored({n: v for n, v in held.items() if n != "scale"}), wanted) == [
        "weight scale is missing"
    ]
    (line,) = changed(stored({**held, "more": held["w"]}), wanted)
    assert line == "weight more is not one that the manifest has"
