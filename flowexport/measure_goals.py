"""Measure what the forms gain, layer by layer: ``python -m flowexport.measure_goals``.

Every row sets ours beside a baseline: one attention layer with its projections
or one causal core beside the stock export of the published form, one step (of 20 in a row)
beside that export's whole forward again (and beside our own), ours beside ONNX Runtime's fused
softmax attention. Outputs are compared before anything is measured; both run
interleaved in one process on one thread, timed by that thread's CPU time.
Memory is that of a child process each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.baseline.compare import operator_counts, peak_memory
from flowexport.baseline.sessions import BASELINE, LIMIT, OURS
from flowexport.bench import machine_facts, measure, ratio_of_medians
from flowexport.bench.machine import load_average
from flowexport.bench.steps import STEPS_A_ROUND
from flowexport.core.errors import FlowExportError, InputError, UnknownNameError, VerificationError
from flowexport.core.types import Artifact
from flowexport.goal_sides import (
    OWN_FORWARD,
    PASSES,
    PRODUCTS,
    Row,
    compared,
    feeds_of,
    published,
    softmax,
    step_sessions,
)
from flowexport.measure_forms import CAUSAL, SMALL, STAGES, quiet_libraries
from flowexport.registry import TARGETS


def _layers(target: str, wanted: Sequence[float]) -> list[Row]:
    """One row a stage; a small layer, of 0.1 ms, must never be slower than the published form."""
    large = STAGES[: len(STAGES) - len(SMALL)]
    rows = [Row("layer", target, *size, w) for size, w in zip(large, wanted, strict=True)]
    return rows + [Row("layer", target, *size, 1.0, rounds=600) for size in SMALL]


_HEADS, _WIDTH = CAUSAL[0][1:]
ROWS = (
    *_layers("onnx", (3.0, 1.8, 1.25, 1.0)),
    *_layers("tflite", (1.6, 1.15, 1.0, 1.0)),
    Row("causal", "onnx", 1024, _HEADS, _WIDTH, 7.0, less_memory=30),
    Row("causal", "onnx", 4096, _HEADS, _WIDTH, 9.0, less_memory=30, rounds=20),
    Row("causal", "tflite", 1024, _HEADS, _WIDTH, 5.0, rounds=20),
    Row("step", "onnx", 1024, _HEADS, _WIDTH, 200.0),
    Row("softmax", "onnx", 196, 12, 32, 1.4),
    Row("softmax", "onnx", 784, 12, 16, 7.0, rounds=30),
    Row("softmax", "onnx", 1024, 8, 64, 3.0, rounds=30),
    Row("softmax", "onnx", 3136, 12, 8, 80.0, rounds=10),
)


def measure_row(row: Row, *, rounds: int | None = None) -> dict[str, Any]:
    """Make both sides of a row, compare their outputs, measure them interleaved.

    Args:
        rounds: runs of each; the row's where None.

    Returns:
        The row's fields, and ``ratio``, ``limit`` (of the projections alone) and
        ``products_limit`` (with features and products; the former of layers only),
        ``passes_limit`` (with the flows' passes over the tokens as well: LiteRT's large layers,
        ONNX Runtime's causal cores),
        ``own_forward_over_step`` (a step's row), ``ms``, ``max_rel``, ``form``, ``partitions``
        (LiteRT), ``operators`` of each file by name, ``memory`` (loading and running, and
        ``run_``: running alone), ``load`` and ``reached``. Where the published form needs
        more memory than there is, ``not_run`` with the reason stands in their place.

    Raises:
        VerificationError: the outputs disagree; nothing is measured then.
    """
    if (missing := _too_large(row)) is not None:
        return {"name": row.name, **asdict(row), "not_run": missing, "reached": False}
    with tempfile.TemporaryDirectory(prefix="flowexport-goals-") as folder, ExitStack() as stack:
        root = Path(folder)
        artifacts: dict[str, Artifact] = {}
        if row.kind == "step":
            sessions, worst = step_sessions(row, root, stack)
            feeds: dict[str, np.ndarray] = {}
        else:
            artifacts = softmax(row, root) if row.kind == "softmax" else published(row, root)
            feeds = feeds_of(artifacts[OURS].inputs)
            sessions = {
                kind: stack.enter_context(TARGETS.get(row.target).load(a, threads=1))
                for kind, a in artifacts.items()
            }
            worst = compared(row, sessions, feeds)
        memory = _memory(artifacts, feeds, root) if row.less_memory is not None else None
        reports = measure(
            sessions,
            feeds,
            warmup=2,
            min_runs=rounds or row.rounds,
            min_seconds=0,
            clock=time.thread_time_ns,
        )
        partitions = sessions[OURS].info.details.get("partitions")
        form = sessions[OURS].artifact.form
        inspect = TARGETS.get(row.target).inspect
        operators = {kind: operator_counts(inspect(a.path)) for kind, a in artifacts.items()}
    for kind, report in reports.items():
        if report.not_run is not None:
            raise VerificationError(f"measure {row.name}: {kind}: {report.not_run}.")
    times = {kind: list(report.samples_ms) for kind, report in reports.items()}
    if row.kind == "step":
        times[OURS] = [t / STEPS_A_ROUND for t in times[OURS]]
    ratio = ratio_of_medians(times[BASELINE], times[OURS])
    reached = ratio.median >= row.wanted and partitions in (None, 1)
    if row.less_memory is not None and memory is not None:
        reached = reached and memory.get("ratio", 0) >= row.less_memory
    found: dict[str, Any] = {
        "name": row.name,
        **asdict(row),
        "ratio": ratio.to_json(),
        "limit": None,
        "ms": {kind: float(np.median(t)) for kind, t in times.items()},
        "max_rel": worst,
        "form": form,
        "partitions": partitions,
        "operators": operators,
        "memory": memory,
        "load": load_average(),
        "reached": reached,
    }
    bounds = {"limit": LIMIT, "products_limit": PRODUCTS, "passes_limit": PASSES}
    for name, kind in bounds.items():
        if kind in times:
            found[name] = ratio_of_medians(times[BASELINE], times[kind]).to_json()
    if OWN_FORWARD in times:
        own = ratio_of_medians(times[OWN_FORWARD], times[OURS])
        found["own_forward_over_step"] = own.to_json()
    return found


def _memory(
    artifacts: Mapping[str, Artifact], feeds: Mapping[str, np.ndarray], root: Path
) -> dict[str, Any]:
    """Return the extra bytes of the baseline and ours, and their ratios where known."""
    sides = {k: peak_memory(k, artifacts[k], feeds, root, 1) for k in (BASELINE, OURS)}
    memory: dict[str, Any] = {}
    for prefix in ("", "run_"):
        baseline, ours = (sides[k][f"{prefix}extra_bytes"] for k in (BASELINE, OURS))
        memory[f"baseline_{prefix}extra_bytes"] = baseline
        memory[f"ours_{prefix}extra_bytes"] = ours
        if baseline and ours:
            memory[f"{prefix}ratio"] = baseline / ours
    return memory


def _too_large(row: Row) -> str | None:
    """Say why the published causal form cannot run here, or None where it can.

    It holds (B, L, H, D, M) tensors: two in the first run, two more in the memory that ONNX
    Runtime plans for the next ones. A row compares outputs in one process, which keeps two,
    while another measures the peak: seven, with what else there is.
    """
    if row.kind not in ("causal", "step"):
        return None
    import psutil

    needed = 7 * 4 * row.tokens * row.heads * row.width**2
    available = int(psutil.virtual_memory().available)
    if needed <= available:
        return None
    return (
        f"the published form needs about {needed / 2**30:.1f} GiB at L = {row.tokens};"
        f" {available / 2**30:.1f} GiB are available"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flowexport.measure_goals", description=__doc__)
    parser.add_argument("--row", action="append", help="measure this row only (repeatable)")
    parser.add_argument("--rounds", type=int, help="runs of each side [the row's]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    by_name = {row.name: row for row in ROWS}
    try:
        if options.rounds is not None and options.rounds < 2:
            raise InputError(f"measure goals: --rounds is {options.rounds}; expected 2 or more.")
        for name in options.row or ():
            if name not in by_name:
                raise UnknownNameError("row", name, by_name, where="measure goals")
        found = []
        if not options.json:
            print(_HEADER)
        for row in [by_name[n] for n in options.row] if options.row else ROWS:
            with quiet_libraries():
                found.append(measure_row(row, rounds=options.rounds))
            if not options.json:
                print(line(found[-1]), flush=True)
        if options.json:
            print(json.dumps({"machine": machine_facts(), "rows": found}, indent=1))
    except FlowExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


_HEADER = (
    f"{'row':<20}{'wanted':>8}{'ratio':>9}  {'95 % interval':<18}{'bound':>20}"
    f"{'memory':>8}{'parts':>6}{'error':>9}{'load':>6}  form"
)


def line(found: Mapping[str, Any]) -> str:
    """Return a measured row as a line of the printed table.

    The bound is that of the projections alone, then that with features and products, then that
    with the flows' passes over the tokens.
    """
    start = f"{found['name']:<20}{found['wanted']:>7g}x"
    if "not_run" in found:
        return f"{start}  not run: {found['not_run']}"
    ratio = found["ratio"]
    interval = f"[{ratio['ci_low']:.2f}, {ratio['ci_high']:.2f}]"
    bounds = (found.get(k) for k in ("limit", "products_limit", "passes_limit"))
    bound = " / ".join(f"{b['median']:.2f}" for b in bounds if b is not None)
    sizes = found["memory"] or {}
    memory = f"{sizes['ratio']:.0f}x" if "ratio" in sizes else ""
    parts = "" if found["partitions"] is None else str(found["partitions"])
    text = (
        f"{start}{ratio['median']:>8.2f}x  {interval:<18}{bound:>20}{memory:>8}{parts:>6}"
        f"{found['max_rel']:>9.0e}{found['load']:>6.1f}"
        f"  {found['form']}{'' if found['reached'] else '  (not reached)'}"
    )
    if "run_ratio" in sizes:
        text += f"; running alone: {sizes['run_ratio']:.0f}x less memory"
    if own := found.get("own_forward_over_step"):
        text += (
            f"; our own forward: {own['median']:.0f}x [{own['ci_low']:.0f}, {own['ci_high']:.0f}]"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
