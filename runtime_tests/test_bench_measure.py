"""Latency: what is counted, in which order, and what is recorded. No test asserts a real time."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from evidence_fakes import INPUTS, FakeTarget, golden

from flowexport.bench import bench_feeds, machine_facts, measure, ratio_of_medians
from flowexport.core.errors import InputError
from flowexport.core.reports import LatencyReport
from flowexport.core.types import Options, Session, TensorSpec

FEEDS = bench_feeds(INPUTS, golden().cases["batch-3"])


class Clock:
    """Nanoseconds that pass only where a session lets them."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []
        self.collecting: list[bool] = []

    def __call__(self) -> int:
        return self.now

    def session(self, name: str, folder: Path, costs_ms: float) -> Session:
        def spend(result: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            self.now += round(costs_ms * 1e6)
            self.calls.append(name)
            self.collecting.append(gc.isenabled())
            return result

        target = FakeTarget(name, damage=spend)
        return target.load(target.convert(None, Options(), folder))


def test_rounds_are_interleaved_and_start_in_turn(tmp_path: Path) -> None:
    clock = Clock()
    sessions = {n: clock.session(n, tmp_path, cost) for n, cost in (("a", 1), ("b", 2), ("c", 4))}
    reports = measure(sessions, FEEDS, warmup=2, min_runs=6, min_seconds=0, clock=clock)
    measured = clock.calls[6:]
    rounds = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(rounds) == 6
    assert [r[0] for r in rounds] == ["b", "c", "a", "b", "c", "a"]
    assert reports["b"].samples_ms == (2.0,) * 6
    assert reports["a"].together_with == ("b", "c")
    assert reports["a"].warmup == 2 and reports["a"].iterations == 6
    assert not any(clock.collecting[6:]) and gc.isenabled()


def test_both_the_runs_and_the_time_are_reached(tmp_path: Path) -> None:
    for cost, expected in ((1.0, 50), (0.125, 400)):
        clock = Clock()
        reports = measure(
            {"a": clock.session("a", tmp_path, cost)}, FEEDS, min_seconds=0.05, clock=clock
        )
        assert reports["a"].iterations == expected


def test_every_session_gets_the_time_not_only_the_slow_one(tmp_path: Path) -> None:
    clock = Clock()
    sessions = {n: clock.session(n, tmp_path, cost) for n, cost in (("fast", 0.25), ("slow", 8))}
    reports = measure(sessions, FEEDS, min_seconds=0.05, clock=clock)
    assert reports["fast"].iterations == reports["slow"].iterations == 200


def test_a_run_while_the_clock_stood_still_is_made_again(tmp_path: Path) -> None:
    clock = Clock()
    costs = iter([1, 1, 0, 3, 2])  # one to warm up; then 1, 0 again as 3, 2

    def spend(result: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        clock.now += next(costs) * 1_000_000
        return result

    target = FakeTarget("a", damage=spend)
    session = target.load(target.convert(None, Options(), tmp_path))
    reports = measure({"a": session}, FEEDS, warmup=1, min_runs=3, min_seconds=0, clock=clock)
    assert reports["a"].samples_ms == (1.0, 3.0, 2.0) and next(costs, None) is None


def test_statistics_are_those_of_the_raw_samples() -> None:
    report = LatencyReport("a", samples_ms=tuple(float(i) for i in range(1, 102)), warmup=1)
    found = report.summary()
    assert found["latency_ms_p50"] == 51 and found["latency_ms_p90"] == 91
    assert found["latency_ms_p99"] == 100 and found["latency_ms_min"] == 1
    assert found["latency_ms_mean"] == 51 and found["iterations"] == 101
    assert found["latency_ms_std"] == pytest.approx(np.std(range(1, 102)))


def test_report_round_trip_and_conditions(tmp_path: Path) -> None:
    clock = Clock()
    report = measure({"a": clock.session("a", tmp_path, 1)}, FEEDS, min_seconds=0, clock=clock)["a"]
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert LatencyReport.from_json(data).to_json() == report.to_json()
    assert data["threads"] == 1 and data["runtime"].startswith("numpy ")
    assert data["input_shapes"]["x"][0] == 1
    assert data["machine"]["cores_logical"] >= 1 and data["machine"]["memory_bytes"] > 0
    data["latency_ms_p50"] = 1e-9  # an edited statistic is recomputed
    assert LatencyReport.from_json(data).p50 == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_absurd_samples_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="run time"):
        LatencyReport("a", samples_ms=(1.0, bad))


def test_a_session_that_breaks_is_told_and_the_others_are_measured(tmp_path: Path) -> None:
    for fails_at in (0, 15):
        calls = iter(range(1000))

        def breaks(
            result: dict[str, np.ndarray], calls: object = calls, at: int = fails_at
        ) -> Mapping[str, np.ndarray]:
            if next(calls) == at:  # type: ignore[call-overload]
                raise RuntimeError("lost\nthe device")
            return result

        target = FakeTarget("bad", damage=breaks)
        clock = Clock()
        sessions = {
            "bad": target.load(target.convert(None, Options(), tmp_path)),
            "good": clock.session("good", tmp_path, 1),
        }
        reports = measure(sessions, FEEDS, min_seconds=0, clock=clock)
        assert list(reports) == ["bad", "good"]
        assert "lost the device" in str(reports["bad"].not_run) and not reports["bad"].samples_ms
        assert reports["bad"].summary()["latency_ms_p50"] is None
        assert reports["good"].iterations == 50 and reports["good"].together_with == ()


def test_nothing_to_measure() -> None:
    assert measure({}, FEEDS) == {}
    with pytest.raises(InputError, match="min_runs"):
        measure({}, FEEDS, min_runs=0)


def test_feeds_fit_a_fixed_batch() -> None:
    specs = tuple(TensorSpec(s.name, (2, *s.shape[1:]), s.dtype) for s in INPUTS)
    feeds = bench_feeds(specs, golden().cases["random-1"])
    for spec in specs:
        spec.check(feeds[spec.name], "test")


def test_machine_facts_never_hold_an_invented_value() -> None:
    facts = machine_facts()
    json.dumps(facts, allow_nan=False)
    assert facts["python"] and facts["os"]
    assert all(value != "" for value in facts.values())


def test_ratio_of_paired_medians() -> None:
    rng = np.random.default_rng(0)
    drift = 1 + 0.5 * np.sin(np.arange(300) / 20)  # common to both
    a = 3.0 * drift * np.exp(0.02 * rng.standard_normal(300))
    b = 2.0 * drift * np.exp(0.02 * rng.standard_normal(300))
    found = ratio_of_medians(a, b)
    assert found.ci_low < 1.5 < found.ci_high and found.ci_high - found.ci_low < 0.1
    assert found == ratio_of_medians(a, b)
    inverse = ratio_of_medians(b, a)
    assert inverse.median == pytest.approx(1 / found.median)
    same = ratio_of_medians(a, a)
    assert (same.ci_low, same.median, same.ci_high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b"), [([1, 2], [1]), ([1], [1]), ([1, 0], [1, 1]), ([1, np.nan], [1, 1]), ([], [])]
)
def test_ratio_of_nonsense_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(InputError):
        ratio_of_medians(a, b)
