"""Measure what the forms gain, layer by layer: ``python -m flowexport.measure_goals``.

Every row sets ours beside a baseline: one attention layer with its projections
or one causal core beside the stock export of the published form, one step (of 20 in a row)
beside the whole forward again, ours beside ONNX Runtime's fused softmax
attention. Outputs are compared before anything is measured; both run
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.baseline.compare import peak_memory
from flowexport.baseline.programs import projections_only, save_published
from flowexport.baseline.sessions import BASELINE, LIMIT, OURS, difference
from flowexport.baseline.stock import export_stock
from flowexport.bench import machine_facts, measure, ratio_of_medians
from flowexport.bench.machine import load_average
from flowexport.bench.steps import STEPS_A_ROUND
from flowexport.core.errors import FlowExportError, InputError, UnknownNameError, VerificationError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Options, Precision, Session, TensorSpec
from flowexport.measure_forms import CAUSAL, STAGES, layer
from flowexport.registry import OPS, TARGETS

# Rounding in another order over sums of up to 4,096 tokens.
TOLERANCE = 5e-5
CHECKED_STEPS = 32


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kind: ``layer``, ``causal``, ``step`` or ``softmax``.
        tokens, heads, width: N, H, D of the attention.
        wanted: least ratio of the baseline's median time to ours.
        less_memory: least ratio of the baseline's extra memory to ours, or None.
        rounds: runs of each unless the caller says otherwise.
    """

    kind: str
    target: str
    tokens: int
    heads: int
    width: int
    wanted: float
    less_memory: float | None = None
    rounds: int = 60

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.target}-{self.tokens}"


def _layers(target: str, wanted: Sequence[float]) -> list[Row]:
    return [Row("layer", target, *size, w) for size, w in zip(STAGES, wanted, strict=True)]


_HEADS, _WIDTH = CAUSAL[0][1:]
ROWS = (
    *_layers("onnx", (3.0, 1.8, 1.25, 1.0)),
    *_layers("tflite", (1.6, 1.15, 1.0, 1.0)),
    Row("causal", "onnx", 1024, _HEADS, _WIDTH, 7.0, less_memory=30, rounds=20),
    Row("causal", "onnx", 4096, _HEADS, _WIDTH, 9.0, less_memory=30, rounds=5),
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
        The row's fields, and ``ratio``, ``limit`` (of the projections alone, a
        layer's row only), ``ms``, ``max_rel``, ``form``, ``partitions`` (LiteRT),
        ``memory``, ``load`` and ``reached``.

    Raises:
        VerificationError: the outputs disagree; nothing is measured then.
    """
    with tempfile.TemporaryDirectory(prefix="flowexport-goals-") as folder, ExitStack() as stack:
        root = Path(folder)
        if row.kind == "step":
            sessions, worst = _step_sessions(row, root, stack)
            feeds: dict[str, np.ndarray] = {}
        else:
            artifacts = _softmax(row, root) if row.kind == "softmax" else _published(row, root)
            feeds = _feeds(artifacts[OURS].inputs)
            sessions = {
                kind: stack.enter_context(TARGETS.get(row.target).load(a, threads=1))
                for kind, a in artifacts.items()
            }
            worst = _compared(row, sessions, feeds)
        memory: dict[str, Any] | None = None
        if row.less_memory is not None:
            baseline, ours = (
                peak_memory(kind, artifacts[kind], feeds, root, 1) for kind in (BASELINE, OURS)
            )
            memory = {"baseline_extra_bytes": baseline, "ours_extra_bytes": ours}
            if baseline and ours:
                memory["ratio"] = baseline / ours
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
    limit = ratio_of_medians(times[BASELINE], times[LIMIT]).to_json() if LIMIT in times else None
    return {
        "name": row.name,
        **asdict(row),
        "ratio": ratio.to_json(),
        "limit": limit,
        "ms": {kind: float(np.median(t)) for kind, t in times.items()},
        "max_rel": worst,
        "form": form,
        "partitions": partitions,
        "memory": memory,
        "load": load_average(),
        "reached": reached,
    }


def _compared(row: Row, sessions: Mapping[str, Session], feeds: Mapping[str, np.ndarray]) -> float:
    where = f"measure {row.name}"
    if row.kind != "softmax":
        return difference(sessions[BASELINE], sessions[OURS], [feeds], TOLERANCE, where)[1]
    import torch

    q, k, v = (
        torch.from_numpy(feeds[n]).unflatten(-1, (row.heads, row.width)).transpose(1, 2)
        for n in "qkv"
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    got = sessions[BASELINE].run(feeds)["y"]
    worst = float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"{where}: the fused kernel differs from softmax attention by {worst:.1e} of its"
            f" largest output; expected at most {TOLERANCE:.0e}, so no ratio is given."
        )
    return worst


def _feeds(inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        s.name: generator.standard_normal([int(d) for d in s.shape], np.float32) for s in inputs
    }


def _core(row: Row, variant: str) -> Any:
    """Return the attention without projections as a module: q, k, v (B, N, C) -> (B, N, C)."""
    import torch
    from torch import nn

    from flowexport.ops.flow_attention import VARIANTS, flow_attention

    class Core(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.unflatten(-1, (row.heads, row.width)) for x in (q, k, v))
            return flow_attention(q, k, v, VARIANTS[variant]).flatten(2)

    return Core()


def _core_inputs(row: Row) -> list[TensorSpec]:
    return [TensorSpec(n, (1, row.tokens, row.heads * row.width)) for n in "qkv"]


def _converted(
    row: Row, module: Any, inputs: Sequence[TensorSpec], outputs: Sequence[str], out: Path
) -> Artifact:
    from flowexport.lowering import lower

    out.mkdir()
    ops = list(OPS.working().values())
    program = lower(module, inputs, outputs, name="layer", ops=ops)
    return TARGETS.get(row.target).convert(program, Options(), out)


def _published(row: Row, root: Path) -> dict[str, Artifact]:
    """Return the stock export of the published form, ours, and a layer's projections alone."""
    from flowexport.lowering.replaced import Replaced

    if row.kind == "layer":
        module = layer(row.tokens, row.heads, row.width, "vision").eval()
        inputs = [TensorSpec("x", (1, row.tokens, row.heads * row.width))]
    else:
        module, inputs = _core(row, "causal").eval(), _core_inputs(row)
    save_published(module, inputs, row.name, root / "published.pt2")
    ours = _converted(row, module, inputs, ["y"], root / OURS)
    stock = root / f"stock{TARGETS.get(row.target).suffix}"
    baseline = export_stock(
        row.target, root / "published.pt2", "layer", inputs, ours.outputs, stock
    )
    artifacts = {BASELINE: baseline, OURS: ours}
    if row.kind == "layer":
        bare = Replaced(module, {op.overload: projections_only for op in OPS.working().values()})
        artifacts[LIMIT] = _converted(row, bare, inputs, ["y"], root / LIMIT)
    return artifacts


def _softmax(row: Row, root: Path) -> dict[str, Artifact]:
    """Return ONNX Runtime's fused MultiHeadAttention and ours, both without projections."""
    import onnx
    from onnx import TensorProto, helper

    inputs = _core_inputs(row)
    ours = _converted(row, _core(row, "vision"), inputs, ["y"], root / OURS)
    shape = list(inputs[0].shape)
    domain = "com.microsoft"
    graph = helper.make_graph(
        [
            helper.make_node(
                "MultiHeadAttention", list("qkv"), ["y"], domain=domain, num_heads=row.heads
            )
        ],
        "softmax",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)],
        ir_version=10,
    )
    path = root / "softmax.onnx"
    onnx.save(model, path)
    fused = Artifact(
        target=row.target,
        path=path,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        precision=Precision.FP32,
        model="softmax",
        recipe_sha256="",
        form="softmax",
        inputs=ours.inputs,
        outputs=ours.outputs,
    )
    return {BASELINE: fused, OURS: ours}


class _Fed(Session):
    """A session that runs ``times`` on feeds of its own, so that unlike ones run in turns."""

    def __init__(self, session: Session, feeds: Mapping[str, np.ndarray], times: int = 1) -> None:
        super().__init__(session.artifact)
        self._session, self._feeds, self._times = session, feeds, times

    @property
    def info(self) -> Any:
        return self._session.info

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for _ in range(self._times):
            result = self._session.run(self._feeds)
        return result

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.run(feeds)


def _step_sessions(row: Row, root: Path, stack: ExitStack) -> tuple[dict[str, Session], float]:
    """Return the causal forward and its step, once some steps gave the forward's outputs."""
    import torch
    from torch import nn

    from flowexport.ops.flow_attention import VARIANTS
    from flowexport.ops.flow_attention.streaming import FlowState, initial_state, step

    variant = VARIANTS["causal"]
    reset = initial_state(variant, 1, row.heads, row.width, row.width)
    names = list(FlowState._fields)

    class Step(nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            q, k, v = (x.unflatten(-1, (row.heads, row.width)) for x in (q, k, v))
            y, following = step(q, k, v, FlowState(*state), variant)
            return y.flatten(1), *following

    frame = [TensorSpec(n, (1, row.heads * row.width)) for n in "qkv"]
    state = [TensorSpec(n, tuple(x.shape)) for n, x in zip(names, reset, strict=True)]
    target = TARGETS.get(row.target)
    outputs = ["y", *(f"next_{n}" for n in names)]
    one = stack.enter_context(
        target.load(_converted(row, Step(), [*frame, *state], outputs, root / "step"))
    )
    whole = stack.enter_context(
        target.load(
            _converted(row, _core(row, "causal"), _core_inputs(row), ["y"], root / "forward")
        )
    )
    sequence = _feeds(_core_inputs(row))
    wanted = whole.run(sequence)["y"]
    values = {n: x.numpy() for n, x in zip(names, reset, strict=True)}
    worst = 0.0
    for t in range(min(CHECKED_STEPS, row.tokens)):
        feeds = {**{n: sequence[n][:, t] for n in "qkv"}, **values}
        results = one.run(feeds)
        values = {n: results[f"next_{n}"] for n in names}
        worst = max(worst, float(np.abs(results["y"] - wanted[:, t]).max()))
    worst /= float(np.abs(wanted).max())
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"measure {row.name}: steps differ from the forward by {worst:.1e} of its largest"
            f" output; expected at most {TOLERANCE:.0e}, so no ratio is given."
        )
    steps = _Fed(one, feeds, times=STEPS_A_ROUND)
    return {BASELINE: _Fed(whole, sequence), OURS: steps}, worst


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
    f"{'row':<20}{'wanted':>8}{'ratio':>9}  {'95 % interval':<18}{'bound':>7}"
    f"{'memory':>8}{'parts':>6}{'error':>9}{'load':>6}  form"
)


def line(found: Mapping[str, Any]) -> str:
    """Return a measured row as a line of the printed table."""
    ratio, limit = found["ratio"], found["limit"]
    interval = f"[{ratio['ci_low']:.2f}, {ratio['ci_high']:.2f}]"
    bound = "" if limit is None else f"{limit['median']:.2f}"
    memory = "" if not (found["memory"] or {}).get("ratio") else f"{found['memory']['ratio']:.0f}x"
    parts = "" if found["partitions"] is None else str(found["partitions"])
    return (
        f"{found['name']:<20}{found['wanted']:>7g}x{ratio['median']:>8.2f}x  {interval:<18}"
        f"{bound:>7}{memory:>8}{parts:>6}{found['max_rel']:>9.0e}{found['load']:>6.1f}"
        f"  {found['form']}{'' if found['reached'] else '  (not reached)'}"
    )


if __name__ == "__main__":
    sys.exit(main())
