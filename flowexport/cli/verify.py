"""``flowexport verify``: hash, numbers and accuracy of a bundle's artifacts."""

from __future__ import annotations

from flowexport.cli import options
from flowexport.cli.console import exit_code, out_console, print_json, show_progress


def verify(
    bundle: options.BundlePath,
    target: options.Targets = [],  # noqa: B006
    require: options.Require = [],  # noqa: B006
    threads: options.Threads = None,
    max_accuracy_drop: options.MaxAccuracyDrop = None,
    save: options.Save = False,
    runner: options.Runner = None,
    samples: options.Samples = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Run every artifact on the saved inputs and compare with the float64 reference."""
    from flowexport import pipeline
    from flowexport.report import summary_table

    with show_progress(verbose) as progress:
        result = pipeline.verify(
            bundle,
            targets=target,
            require=require,
            threads=threads,
            max_accuracy_drop=max_accuracy_drop,
            save=save,
            runner=runner,
            samples=samples,
            progress=progress,
        )
    if json:
        print_json(
            {
                "bundle": str(result.bundle),
                "verdict": result.verdict.value,
                "targets": {n: r.summary() for n, r in result.parity.items()},
            }
        )
    else:
        sizes = {
            n: t["size_bytes"] for n, t in result.manifest["targets"].items() if n in result.parity
        }
        title = f"{result.manifest['name']}: {result.verdict.value}"
        out_console().print(summary_table(result.parity, None, sizes, title=title))
    return exit_code(result)
