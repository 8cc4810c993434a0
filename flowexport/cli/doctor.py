"""``flowexport doctor``: what works on this machine, and what mends the rest."""

from __future__ import annotations

import platform
import sys
from typing import Any

from flowexport.cli import options
from flowexport.cli.console import out_console, print_json


def doctor(json: options.Json = False) -> int:
    """Say of each target and each runner of `verify` whether it works here, and what mends it."""
    from rich.table import Table

    document = _collect()
    if json:
        print_json(document)
        return 0
    console = out_console()
    machine = document["machine"]
    console.print(
        f"flowexport {document['flowexport']}, Python {machine['python']}, torch"
        f" {machine['torch']}, {machine['platform']}, {machine['cpus']} CPUs",
        markup=False,
    )
    table = Table(pad_edge=False)
    for column in ("target", "converts", "runs", "versions", "why not, and what mends it"):
        table.add_column(column, overflow="fold")
    for name, entry in document["targets"].items():
        versions = ", ".join(f"{k} {v}" for k, v in entry["toolchain"].items())
        text = "\n".join(filter(None, (entry["reason"], entry["fix"] and f"fix: {entry['fix']}")))
        marks = ("[green]yes[/]" if entry[k] else "[yellow]no[/]" for k in ("converts", "runs"))
        table.add_row(name, *marks, versions or "-", text or "-")
    console.print(table)
    runners = Table(pad_edge=False)
    for column in ("runner", "available", "set up", "packages", "why not, and what mends it"):
        runners.add_column(column, overflow="fold")
    for name, entry in document["runners"].items():
        text = "\n".join(filter(None, (entry["reason"], entry["fix"] and f"fix: {entry['fix']}")))
        marks = ("[green]yes[/]" if entry[k] else "[yellow]no[/]" for k in ("available", "ready"))
        runners.add_row(name, *marks, ", ".join(entry["packages"]) or "-", text or "-")
    console.print(runners)
    for broken in document["broken"]:
        console.print(f"broken {broken['name']}: {broken['reason']}", markup=False)
    return 0


def _collect() -> dict[str, Any]:
    import importlib.metadata
    import os

    from flowexport import __version__
    from flowexport.registry import DATASETS, MODELS, OPS, TARGETS
    from flowexport.runners import RUNNERS

    targets = {}
    for name, target in sorted(TARGETS.working().items()):
        found = target.probe()
        targets[name] = {
            "converts": found.converts,
            "runs": found.runs,
            "toolchain": dict(found.toolchain),
            "reason": found.reason,
            "fix": found.fix,
        }
    for name, reason in TARGETS.broken().items():
        targets[name] = {
            "converts": False,
            "runs": False,
            "toolchain": {},
            "reason": reason,
            "fix": TARGETS.repair(name),
        }
    broken = [
        {"kind": registry.kind, "name": name, "reason": reason}
        for registry in (OPS, MODELS, DATASETS)
        for name, reason in registry.broken().items()
    ]
    return {
        "flowexport": __version__,
        "machine": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "torch": importlib.metadata.version("torch"),
        },
        "targets": targets,
        "runners": {name: _runner(name) for name in RUNNERS},
        "broken": broken,
    }


def _runner(name: str) -> dict[str, Any]:
    from flowexport.runners import probe

    found = probe(name)
    reason, fix = found.reason, found.fix
    if found.available and not found.ready:
        reason = f"not set up yet; the first use does it ({found.fetches})"
        fix = f"flowexport verify BUNDLE --runner {name}"
    return {
        "available": found.available,
        "ready": found.ready,
        "packages": list(found.packages),
        "folder": None if found.folder is None else str(found.folder),
        "reason": reason,
        "fix": fix,
    }
