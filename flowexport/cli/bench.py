"""``flowexport bench``: latency of a bundle's artifacts, or ours beside a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowexport.cli import options
from flowexport.cli.console import (
    complain,
    complete_recipe,
    out_console,
    print_json,
    show_progress,
)
from flowexport.core.errors import EXIT_OK, EXIT_UNAVAILABLE, InputError

if TYPE_CHECKING:
    from flowexport.baseline import Comparison


def bench(
    source: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE_OR_RECIPE",
            help="A folder made by `flowexport convert`; with --baseline a recipe or model.",
            autocompletion=complete_recipe,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="published",
            help="Measure ours beside the stock export of the published form, in fp32.",
        ),
    ] = None,
    target: options.Targets = [],  # noqa: B006
    require: options.Require = [],  # noqa: B006
    threads: options.Threads = None,
    rounds: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="At least N rounds [recipe's].")
    ] = None,
    min_seconds: Annotated[
        float | None,
        typer.Option(min=0, metavar="S", help="At least S measured seconds each [recipe's]."),
    ] = None,
    weights: options.WeightsFile = None,
    inputs: options.Inputs = [],  # noqa: B006
    save: options.Save = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure the latency of every artifact that runs here, all of them interleaved.

    With --baseline: export the published form by the target's stock exporter
    and ours, compare their outputs (exit code 4 and no ratio where they
    disagree), and measure both and the bound of the projections alone.
    """
    if baseline is None:
        return _bench_bundle(
            Path(source),
            [*target, *require] if target else [],
            require,
            threads,
            rounds,
            min_seconds,
            weights,
            inputs,
            save,
            json,
            verbose,
        )
    if save or require:
        raise InputError(
            "bench --baseline: --save and --require are for bundles; expected --target alone."
        )
    from flowexport.baseline import compare_recipe

    with show_progress(verbose) as progress:
        found = compare_recipe(
            source,
            baseline=baseline,
            targets=target,
            threads=threads,
            rounds=rounds,
            min_seconds=min_seconds,
            weights=weights,
            inputs=[options.parse_input(text) for text in inputs],
            progress=progress,
        )
    if json:
        entries = {name: entry.to_json() for name, entry in found.items()}
        print_json({"source": source, "baseline": baseline, "targets": entries})
    else:
        _print_comparison(source, found)
    return EXIT_OK


def _bench_bundle(
    bundle: Path,
    chosen: list[str],
    require: list[str],
    threads: int | None,
    rounds: int | None,
    min_seconds: float | None,
    weights: Path | None,
    inputs: list[str],
    save: bool,
    json: bool,
    verbose: bool,
) -> int:
    from rich.table import Table

    from flowexport import pipeline

    for option, value in (
        ("--rounds", rounds),
        ("--min-seconds", min_seconds),
        ("--weights", weights),
        ("--input", inputs or None),
    ):
        if value is not None:
            raise InputError(
                f"bench {bundle}: {option} is given without --baseline; a bundle has its own.",
                fix="--baseline published",
            )
    with show_progress(verbose) as progress:
        result = pipeline.benchmark(
            bundle, targets=chosen, threads=threads, save=save, progress=progress
        )
    found = {name: report.summary() for name, report in result.latency.items()}
    if json:
        print_json({"bundle": str(result.bundle), "targets": found})
    else:
        table = Table(title=f"{result.manifest['name']}: latency in ms", pad_edge=False)
        table.add_column("target", no_wrap=True)
        for column in ("p50", "p90", "p99", "mean", "runs", "threads"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("runtime / reason", overflow="fold")
        for name, entry in found.items():
            times = [entry[f"latency_ms_{k}"] for k in ("p50", "p90", "p99", "mean")]
            table.add_row(
                name,
                *("-" if t is None else f"{t:.3f}" for t in times),
                str(entry["iterations"] or "-"),
                str(entry["threads"] or "-"),
                entry["runtime"] if entry["not_run"] is None else f"NOT_RUN: {entry['not_run']}",
            )
        out_console().print(table)
    missing = [n for n in require if n not in found or found[n]["not_run"] is not None]
    for name in missing:
        reason = found[name]["not_run"] if name in found else "the bundle has no such artifact"
        complain(f"error: require {name}: NOT_RUN: {reason}")
    return EXIT_UNAVAILABLE if missing else EXIT_OK


def _print_comparison(source: str, found: Mapping[str, Comparison]) -> None:
    from rich.table import Table

    console = out_console()
    for name, entry in found.items():
        told: dict[str, Any] = entry.to_json()
        table = Table(
            title=f"{source} on {name}: ours beside the stock export of the published form",
            pad_edge=False,
        )
        table.add_column("what")
        for column in ("p50 ms", "published / it", "95 % interval", "operators", "extra MB"):
            table.add_column(column, justify="right", no_wrap=True)
        for kind, label, ratio in (
            ("baseline", "published, stock exporter", None),
            ("ours", f"ours: {entry.form}", entry.ratio),
            ("limit", "limit: projections only", entry.limit),
        ):
            memory = entry.memory[kind]
            table.add_row(
                label,
                f"{entry.p50(kind):.3f}",
                "1" if ratio is None else f"{ratio.median:.3f}",
                "" if ratio is None else f"{ratio.ci_low:.3f} to {ratio.ci_high:.3f}",
                str(sum(entry.operators[kind].values())),
                "-" if memory is None else f"{memory / 2**20:.1f}",
            )
        console.print(table)
        console.print(
            f"outputs differ by {entry.max_abs:.1e} ({entry.max_rel:.1e} of the largest) on"
            f" {entry.cases} cases; {entry.ratio.rounds} rounds, {told['threads']} threads,"
            f" {told['clock']} time, load {told['load_before']} to {told['load_after']}",
            markup=False,
            soft_wrap=True,
        )
        if entry.step is not None:
            step, ratio = told["step"], entry.step.ratio
            console.print(
                f"one step: {step['step_ms_p50']:.3f} ms; running the published forward of"
                f" {step['length']} again takes {ratio.median:.1f} times as long (95 %:"
                f" {ratio.ci_low:.1f} to {ratio.ci_high:.1f}); {step['length']} steps differ from"
                f" it by {step['max_rel']:.1e} of the largest output",
                markup=False,
                soft_wrap=True,
            )
