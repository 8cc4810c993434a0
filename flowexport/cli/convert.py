"""``flowexport convert``: from weights to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowexport.cli import options
from flowexport.cli.console import (
    exit_code,
    out_console,
    print_json,
    show_progress,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowexport.pipeline import Result
    from flowexport.plan import Plan


def convert(
    source: options.Source,
    target: options.Targets = [],  # noqa: B006
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Of every target [recipe's]: fp32, fp16, int8-dynamic, int8-static, int8-weights,"
            " palette8, palette6 or palette4.",
        ),
    ] = None,
    weights: options.WeightsFile = None,
    inputs: options.Inputs = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle's folder [out/RECIPE].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older bundle in DIR.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not verify.")] = False,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="Do not measure latency.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Convert fp16 that `flowexport check` calls unsafe.")
    ] = False,
    no_plugin: Annotated[
        bool, typer.Option("--no-plugin", help="TensorRT: attention from its own layers.")
    ] = False,
    calibration: options.Calibration = None,
    max_accuracy_drop: options.MaxAccuracyDrop = None,
    require: options.Require = [],  # noqa: B006
    threads: options.Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Convert, verify, benchmark and report: one command from weights to a bundle."""
    from flowexport.pipeline import run_plan
    from flowexport.plan import make_plan

    with show_progress(verbose) as progress:
        specs = [options.parse_input(text) for text in inputs]
        progress.stage("resolve")
        plan = make_plan(
            source,
            targets=target,
            precision=precision,
            weights=weights,
            inputs=specs,
            out=out,
            force=force,
            threads=threads,
            require=require,
            check=not no_check,
            plugin=not no_plugin,
            calibration=calibration,
            max_accuracy_drop=max_accuracy_drop,
        )
        for name, found in plan.checks.items():
            progress.note(f"{name}: {found.action}")
        if not dry_run:
            result = run_plan(
                plan,
                force=force,
                verify=not no_verify,
                bench=not no_bench,
                require=require,
                progress=progress,
            )
    if dry_run:
        print_json(plan.to_json()) if json else _print_plan(plan)
        return 0
    print_json(_document(result)) if json else _print_result(result)
    return exit_code(result)


def _document(result: Result) -> dict[str, Any]:
    targets: dict[str, Any] = {}
    for name in dict.fromkeys([*result.manifest["targets"], *result.parity]):
        entry = result.manifest["targets"].get(name, {})
        keys = ("path", "sha256", "size_bytes", "precision", "form", "fusions")
        targets[name] = {
            **{k: entry.get(k) for k in keys},
            "warnings": _warnings(entry),
            **(result.parity[name].summary() if name in result.parity else {}),
            "latency": result.latency[name].summary() if name in result.latency else None,
        }
    return {
        "bundle": str(result.bundle),
        "manifest": str(result.bundle / "manifest.json"),
        "report": str(result.bundle / "report.html"),
        "recipe_sha256": result.manifest["recipe_sha256"],
        "verdict": result.verdict.value,
        "targets": targets,
    }


def _warnings(entry: Mapping[str, Any]) -> list[str]:
    """Return what a target did otherwise than asked, and what mends it."""
    return list(entry.get("details", {}).get("warnings", ()))


def _print_result(result: Result) -> None:
    from flowexport.report import summary_table

    console = out_console()
    sizes = {n: t["size_bytes"] for n, t in result.manifest["targets"].items()}
    title = f"{result.manifest['name']}: {result.verdict.value}"
    console.print(summary_table(result.parity, result.latency, sizes, title=title))
    for name, entry in result.manifest["targets"].items():
        for text in _warnings(entry):
            console.print(f"warning: {name}: {text}", markup=False, soft_wrap=True)
    console.print(f"bundle: {result.bundle}", markup=False, soft_wrap=True)
    console.print(f"report: {result.bundle / 'report.html'}", markup=False, soft_wrap=True)


def _print_plan(plan: Plan) -> None:
    from rich.table import Table

    console = out_console()
    document = plan.to_json()

    def line(key: str, value: object) -> None:
        console.print(f"{key:<10}{value}", markup=False, soft_wrap=True)

    line("recipe", f"{document['recipe']} ({document['recipe_sha256'][:12]})")
    line("model", f"{document['model']}, {document['parameters']:,} parameters")
    line("weights", plan.recipe.weights or "shipped")
    for spec in plan.subject.spec.inputs:
        line("input", f"{spec.name} {'x'.join(map(str, spec.shape))} {spec.dtype}")
    line("outputs", ", ".join(document["outputs"]))
    line("data set", document["dataset"] or "none")
    line("out", document["out"])
    table = Table(pad_edge=False)
    for column in ("target", "precision", "options", "plan"):
        table.add_column(column, overflow="fold")
    for name, entry in document["targets"].items():
        settings = ", ".join(f"{k}={v}" for k, v in entry["options"].items()) or "-"
        table.add_row(name, entry["precision"], settings, "convert")
    for name, entry in document["not_run"].items():
        text = f"NOT_RUN: {entry['reason']}"
        table.add_row(name, "-", "-", text + (f" Fix: {entry['fix']}" if entry["fix"] else ""))
    console.print(table)
