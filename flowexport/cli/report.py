"""``flowexport report``: the report of a bundle, written anew."""

from __future__ import annotations

from flowexport.cli import options
from flowexport.cli.console import print_json


def report(bundle: options.BundlePath, json: options.Json = False) -> int:
    """Write report.html anew from report.json, and print where it is."""
    from flowexport import pipeline

    path = pipeline.report(bundle)
    if json:
        print_json({"report": str(path), "data": str(path.with_suffix(".json"))})
    else:
        print(path)
    return 0
