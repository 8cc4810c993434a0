"""Measure every form of Flow-Attention on a runtime: ``python -m flowexport.measure_forms``.

One attention layer with its projections is converted in each form and all of
them run interleaved on one thread. Times are CPU time of the calling thread;
absolute values are the machine's, the ratios to the published form are used.
``--write`` puts the measured rows into the table that
:func:`flowexport.ops.flow_attention.table.choose` reads; ``--chosen`` measures
nothing and prints what that table gives each target, size and precision, and why.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.bench.machine import load_average, machine_facts
from flowexport.bench.measure import measure
from flowexport.bench.statistics import ratio_of_medians
from flowexport.core.errors import (
    ConversionError,
    FlowExportError,
    InputError,
    UnknownNameError,
    VerificationError,
)
from flowexport.core.types import Options, TensorSpec

# (tokens, heads, width): the vision model's four stages at 224 x 224; then small layers, as the
# digits' first two stages and the time-series model of 29 steps have them.
SMALL = ((64, 3, 16), (16, 6, 16), (29, 8, 16))
STAGES = ((3136, 12, 8), (784, 12, 16), (196, 12, 32), (49, 12, 64), *SMALL)
CAUSAL = ((64, 8, 64), (256, 8, 64), (1024, 8, 64), (4096, 8, 64), (29, 4, 16))
TARGETS = ("onnx", "tflite")
# Forms differ in the order of float32 sums only.
TOLERANCE = 2e-5


# Loggers of what the exporters import: parts that are missing or deprecated, of no use here.
_TALKATIVE = ("torch.onnx", "torch.utils._pytree", "torchao")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back what the exporters and their helpers warn of; errors and our own warnings stay."""
    import torch  # noqa: F401  its import sets the levels of its loggers

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    # LiteRT's converter reads it once, when it first has something to say.
    native = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"flowexport(\.|$)")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # no INFO
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if native is None:
                os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)


def layer(tokens: int, heads: int, width: int, variant: str) -> Any:
    """Return an attention layer with fused projections, random weights, as a torch module."""
    import torch
    from torch import nn

    from flowexport.ops.flow_attention import VARIANTS, flow_attention

    channels = heads * width

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(channels, 3 * channels)
            self.proj = nn.Linear(channels, channels)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (p.unflatten(-1, (heads, width)) for p in parts)
            return self.proj(flow_attention(q, k, v, VARIANTS[variant]).flatten(2))

    torch.manual_seed(0)
    return Layer()


def measure_stage(
    target_name: str,
    tokens: int,
    heads: int,
    width: int,
    *,
    variant: str = "vision",
    forms: Sequence[str] | None = None,
    min_runs: int = 50,
    min_seconds: float = 1.0,
) -> dict[str, Any]:
    """Convert and run one layer in each form.

    Args:
        target_name: ``onnx`` or ``tflite``.
        tokens, heads, width: N, H, D of the layer; C = H·D.
        forms: those to measure beside ``published``; None for all that apply.
        min_runs, min_seconds: at least so many rounds, and CPU seconds, a form.

    Returns:
        ``{"tokens", "width", "heads", "variant", "forms": {form: {"ms_p50",
        "ratio": {"median", "ci_low", "ci_high"}, "max_error"}}, "refused":
        {form: reason}, "load"}`` where ratio is the published form's time over the
        form's, above 1 is faster; refused are forms that the runtime's converter
        does not take at this size.

    Raises:
        ConversionError: the converter refuses the published form or one of ``forms``.
        VerificationError: a form's result is not the published form's.
    """
    from flowexport import registry
    from flowexport.lowering import lower
    from flowexport.ops.flow_attention import VARIANTS
    from flowexport.ops.flow_attention.lowered import DESCRIPTOR, applicable

    target = registry.TARGETS.get(target_name)
    names = list(forms) if forms is not None else list(applicable(VARIANTS[variant]))
    names = ["published", *(n for n in names if n != "published")]
    x = np.random.default_rng(0).standard_normal((1, tokens, heads * width), np.float32)
    program = lower(
        layer(tokens, heads, width, variant),
        [TensorSpec("x", (1, tokens, heads * width))],
        ["y"],
        name="layer",
        ops=[DESCRIPTOR],
    )
    sessions = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out = Path(folder) / name
            out.mkdir()
            try:
                artifact = target.convert(program, Options(extra={"form": name}), out)
            except ConversionError as error:
                if forms is not None or name == "published":
                    raise
                refused[name] = str(error)
                continue
            sessions[name] = target.load(artifact, threads=1)
        try:
            return {
                "tokens": tokens,
                "width": width,
                "heads": heads,
                "variant": variant,
                "forms": _compare(sessions, {"x": x}, min_runs, min_seconds),
                "refused": refused,
                "load": load_average(),
            }
        finally:
            for session in sessions.values():
                session.close()


def _compare(
    sessions: Mapping[str, Any], feeds: Mapping[str, np.ndarray], runs: int, seconds: float
) -> dict[str, Any]:
    truth = sessions["published"].run(feeds)["y"].astype(np.float64)
    errors = {}
    for name, session in sessions.items():
        error = np.abs(session.run(feeds)["y"] - truth).max() / np.abs(truth).max()
        if not error <= TOLERANCE:
            raise VerificationError(
                f"measure forms: {name} differs from published by {error:.1e};"
                f" expected at most {TOLERANCE:.0e}."
            )
        errors[name] = float(error)
    reports = measure(
        sessions, feeds, min_runs=runs, min_seconds=seconds, clock=time.thread_time_ns
    )
    baseline = reports["published"].samples_ms
    result = {}
    for name, report in reports.items():
        if not report.samples_ms:
            raise VerificationError(f"measure forms: {name}: {report.not_run}.")
        result[name] = {
            "ms_p50": float(np.median(report.samples_ms)),
            "ratio": ratio_of_medians(baseline, report.samples_ms).to_json(),
            "max_error": errors[name],
        }
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flowexport.measure_forms", description=__doc__)
    parser.add_argument("--target", default="onnx", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--form", action="append", help="measure this form only (repeatable)")
    numbers = f"1 to {len(STAGES)}, causal 1 to {len(CAUSAL)} (repeatable)"
    parser.add_argument("--stage", type=int, action="append", help=numbers)
    parser.add_argument("--causal", action="store_true", help="the causal forms instead")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time a form")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help="put the rows into the table")
    parser.add_argument("--chosen", action="store_true", help="print the choices and end")
    options = parser.parse_args(arguments)
    try:
        if options.chosen:
            _print_chosen(chosen_forms(), as_json=options.json)
            return 0
        if options.target not in TARGETS:
            raise UnknownNameError("target", options.target, TARGETS, where="measure forms")
        sizes = CAUSAL if options.causal else STAGES
        for number in options.stage or ():
            if not 1 <= number <= len(sizes):
                raise InputError(f"measure forms: --stage is {number}; expected 1 to {len(sizes)}.")
        chosen = [sizes[i - 1] for i in options.stage or range(1, len(sizes) + 1)]
        variant = "causal" if options.causal else "vision"
        stages = []
        for tokens, heads, width in chosen:
            with quiet_libraries():
                stage = measure_stage(
                    options.target,
                    tokens,
                    heads,
                    width,
                    variant=variant,
                    forms=options.form,
                    min_seconds=options.seconds,
                )
            stages.append(stage)
            if not options.json:
                _print(stage)
        report = {"target": options.target, "machine": machine_facts(), "stages": stages}
        if options.json:
            print(json.dumps(report, indent=1))
        if options.write:
            from flowexport.ops.flow_attention.table import write_rows

            write_rows(options.target, stages)
    except FlowExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def chosen_forms() -> list[dict[str, Any]]:
    """Return what the table gives every registered target at the measured sizes.

    Returns:
        Rows of target, precision, variant, tokens, heads, width, form and reason.
    """
    from flowexport.ops.descriptor import AttentionSite
    from flowexport.ops.flow_attention import VARIANTS, op_arguments
    from flowexport.ops.flow_attention.table import choose
    from flowexport.registry import TARGETS as REGISTERED

    result = []
    for target in REGISTERED.names():
        for variant, sizes in (("vision", STAGES), ("causal", CAUSAL)):
            for (tokens, heads, width), precision in product(sizes, ("fp32", "fp16")):
                shape = (1, tokens, heads, width)
                arguments = op_arguments(VARIANTS[variant])
                site = AttentionSite("FlowAttention", "", shape, shape, shape, arguments)
                choice = choose(target, precision, site)
                row: dict[str, Any] = {"target": target, "precision": precision}
                row |= {"variant": variant, "tokens": tokens, "heads": heads, "width": width}
                result.append({**row, "form": choice.form, "reason": choice.reason})
    return result


def _print_chosen(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    for row in rows:
        print(
            f"{row['target']:<9}{row['precision']:<6}{row['variant']:<8}{row['tokens']:>5} x"
            f" {row['heads']:>2} x {row['width']:<4}{row['form']:<25}{row['reason']}"
        )


def _print(stage: Mapping[str, Any]) -> None:
    print(f"N = {stage['tokens']}, D = {stage['width']}, {stage['variant']}, load {stage['load']}")
    for name, row in stage["forms"].items():
        ratio = row["ratio"]
        print(
            f"  {name:<26}{row['ms_p50']:9.2f} ms  {ratio['median']:5.2f}x"
            f" [{ratio['ci_low']:.2f}, {ratio['ci_high']:.2f}]  error {row['max_error']:.0e}"
        )
    for name, reason in stage["refused"].items():
        print(f"  {name:<26}refused: {reason}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
