"""What the verbs share: output, progress, completion, exit codes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flowexport.core.errors import EXIT_OK, EXIT_UNAVAILABLE, EXIT_VERIFICATION
from flowexport.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from flowexport.pipeline import Result


def out_console() -> Console:
    """Return the console for results, on stdout; wide enough for a table in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one JSON document of a ``--json`` run."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def complain(text: str) -> None:
    """Print one line on stderr."""
    print(text, file=sys.stderr)


class _Lines(Progress):
    """One line a stage, for ``--verbose`` without a terminal."""

    def stage(self, name: str) -> None:
        complain(f"flowexport: {name}")

    def note(self, text: str) -> None:
        complain(f"flowexport: {text}")


class _Bar(Progress):
    """A live line with a bar on stderr; a finished stage stays where ``verbose`` wants it."""

    def __init__(self, bar: Any, verbose: bool) -> None:
        self._bar = bar
        self._verbose = verbose
        self._task: Any = None

    def stage(self, name: str) -> None:
        self.end()
        self._task = self._bar.add_task(name, total=None, detail="")

    def step(self, done: float, total: float | None, detail: str = "") -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)

    def note(self, text: str) -> None:
        if self._verbose:
            self._bar.console.print(text, highlight=False, markup=False)

    def end(self) -> None:
        if self._task is not None:
            if self._verbose:
                self._bar.update(self._task, completed=1, total=1, detail="")
            else:
                self._bar.remove_task(self._task)
            self._task = None


@contextmanager
def show_progress(verbose: bool) -> Iterator[Progress]:
    """Draw progress on stderr: live on a terminal, lines with ``--verbose``, else nothing.

    ``--verbose`` also shows what runtimes say of themselves.
    """
    if verbose:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("flowexport").setLevel(logging.INFO)
    if not sys.stderr.isatty():
        yield _Lines() if verbose else Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True), transient=not verbose) as bars:
        bar = _Bar(bars, verbose)
        yield bar
        bar.end()


def exit_code(result: Result) -> int:
    """Say on stderr what failed, and return the exit code.

    4 where an artifact is not what it must be, else 5 where a required target did not run.
    """
    for name in result.failed:
        complain(f"error: verify {name}: {result.parity[name].reason}")
    if result.failed:
        return EXIT_VERIFICATION
    for name in result.missing:
        found = result.parity.get(name)
        reason = found.reason if found else "it was not verified."
        complain(f"error: require {name}: NOT_RUN: {reason}")
        if found and found.fix:
            complain(f"Fix: {found.fix}")
    return EXIT_UNAVAILABLE if result.missing else EXIT_OK


def complete_recipe(incomplete: str) -> list[str]:
    """Complete a shipped recipe's name; imports nothing heavy."""
    from importlib.resources import files

    names = (f.name for f in files("flowexport_recipes").iterdir() if f.name.endswith(".yaml"))
    return sorted(n.removesuffix(".yaml") for n in names if n.startswith(incomplete))


def complete_target(incomplete: str) -> list[str]:
    """Complete a target's name; imports none of them."""
    from importlib.metadata import entry_points

    names = {p.name for p in entry_points(group="flowexport.targets")}
    return sorted(n for n in names if n.startswith(incomplete))
