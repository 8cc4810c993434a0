"""``flowexport bench``: latency of a bundle's artifacts, measured interleaved."""

from __future__ import annotations

from flowexport.cli import options
from flowexport.cli.console import complain, out_console, print_json, show_progress
from flowexport.core.errors import EXIT_OK, EXIT_UNAVAILABLE


def bench(
    bundle: options.BundlePath,
    target: options.Targets = [],  # noqa: B006
    require: options.Require = [],  # noqa: B006
    threads: options.Threads = None,
    save: options.Save = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure the latency of every artifact that runs here, all of them interleaved."""
    from rich.table import Table

    from flowexport import pipeline

    chosen = [*target, *require] if target else []
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
