"""Runs one command line: errors become a message and an exit code, signals an orderly end."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flowexport.core.errors import (
    EXIT_CONVERSION,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    FlowExportError,
)

_SIGNALS = ("SIGTERM", "SIGHUP")

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EMFILE: "too many files are open",
}


def run(arguments: Sequence[str]) -> int:
    """Run ``flowexport`` with these arguments and return its exit code.

    Every FlowExportError, usage error, full disk or refused permission becomes
    one message on stderr (with ``--json`` also ``{"error": ...}`` on stdout).
    Anything else is a bug and keeps its traceback.
    """
    from typer import TyperException

    wants_json = "--json" in arguments
    if not sys.warnoptions:  # a library's deprecation is none of the user's business
        warnings.simplefilter("ignore")
    with _signals_interrupt():
        try:
            from flowexport.cli.app import command

            code = command().main(
                args=list(arguments), prog_name="flowexport", standalone_mode=False
            )
            if code == EXIT_INTERRUPTED:  # typer's answer to KeyboardInterrupt
                return _interrupted(wants_json)
            return code if isinstance(code, int) else EXIT_OK
        except KeyboardInterrupt:
            return _interrupted(wants_json)
        except TyperException as error:  # a usage error
            say = getattr(error, "format_message", None)
            text = say() if say else str(error)
            return _fail(wants_json, text, None, EXIT_USAGE, "UsageError")
        except FlowExportError as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            message = f"{error.message}\n{notes}" if notes else error.message
            return _fail(wants_json, message, error.fix, error.exit_code, type(error).__name__)
        except MemoryError:
            text = "the memory is used up; expected more of it for this model."
            fix = "close other programs, or convert one target at a time with --target"
            return _fail(wants_json, text, fix, EXIT_CONVERSION, "MemoryError")
        except OSError as error:
            if error.errno not in _WORDS:
                raise
            place = f"{error.filename}: " if error.filename else ""
            return _fail(wants_json, f"{place}{_WORDS[error.errno]}.", None, EXIT_USAGE, "OSError")


def _fail(wants_json: bool, message: str, fix: str | None, code: int, kind: str) -> int:
    text = f"error: {message}" + (f"\nFix: {fix}" if fix else "")
    print(text, file=sys.stderr)
    if wants_json:
        error = {"type": kind, "message": message, "fix": fix, "exit_code": code}
        print(json.dumps({"error": error}, ensure_ascii=False))
    return code


def _interrupted(wants_json: bool) -> int:
    return _fail(wants_json, "interrupted.", None, EXIT_INTERRUPTED, "Interrupted")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a run as Ctrl-C does, so that nothing half is left."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
        # A shell starts background jobs with SIGINT ignored; one sent on purpose still counts.
        if os.name == "posix" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
