"""Runs a converter in a child process, which may crash or be killed without harm."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowexport.bundle import cannot_write, disk_is_full
from flowexport.core import errors
from flowexport.core.errors import ConversionError, FlowExportError
from flowexport.core.types import Artifact, Options

LOG_LINES = 12


@dataclass(frozen=True)
class Conversion:
    """An artifact and what making it cost.

    Attributes:
        seconds: wall time of the child, its imports included.
        peak_rss_bytes: the child's largest resident memory.
    """

    artifact: Artifact
    seconds: float
    peak_rss_bytes: int


def convert_in_child(
    *,
    target: str,
    model: str,
    program: Path,
    options: Options,
    root: Path,
    log: Path,
    tick: Callable[[float], None] | None = None,
) -> Conversion:
    """Convert a saved program in a process of its own.

    Args:
        target: a target's registered name; the artifact goes to ``root/target``.
        program: a ``.pt2`` file of :meth:`LoweredProgram.save`.
        root: the staging folder.
        log: file that takes the child's stdout and stderr.
        tick: called some times a second with the seconds so far.

    Raises:
        ConversionError: the converter refused the program or its process died;
            the message ends with the log's last lines. Other errors that the
            child raised arrive with their own class.
        OutputError: the disk ran full.
    """
    result = run_child(
        "flowexport.worker",
        {
            "target": target,
            "program": str(program),
            "precision": options.precision.value,
            "extra": dict(options.extra),
            "form_reason": options.form_reason,
            "keep_float": list(options.keep_float),
            "calibration": None if options.calibration is None else str(options.calibration),
            "out": str(root / target),
            "root": str(root),
        },
        request_file=program.with_name(f"{target}.request.json"),
        where=f"convert {target} {model}",
        what="the converter",
        root=root,
        log=log,
        tick=tick,
    )
    artifact = Artifact.from_json(result["result"], root)
    if not artifact.path.exists():
        raise ConversionError(
            f"convert {target} {model}: the converter left no file at {artifact.path}."
        )
    return Conversion(artifact, result["seconds"], int(result["peak_rss_bytes"]))


def run_child(
    module: str,
    request: Mapping[str, Any],
    *,
    request_file: Path,
    where: str,
    what: str,
    root: Path,
    log: Path,
    tick: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Run ``python -m module``, whose main is :func:`flowexport.worker.serve`, to its end.

    Args:
        request: JSON for the child, written to ``request_file``.
        where, what: the start of an error's message, and who failed.
        root: folder that the child writes to; its disk may be full.
        log: file that takes the child's stdout and stderr.
        tick: called some times a second with the seconds so far.

    Returns:
        ``{"result": what the work returned, "seconds": wall time of the child,
        "peak_rss_bytes"}``.

    Raises:
        ConversionError: the work failed or the process died; the message ends
            with the log's last lines. Other errors that the child raised
            arrive with their own class.
        OutputError: the disk ran full.
    """
    request_file.write_text(json.dumps({**request, "parent": os.getpid()}), encoding="utf-8")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code, answer = _run([sys.executable, "-m", module, str(request_file)], log, tick)
    seconds = time.monotonic() - started
    result = _parse(answer)
    if code == 0 and result is not None and "result" in result:
        return {**result, "seconds": seconds}
    error = (result or {}).get("error", {})
    if error.get("errno") in (errno.ENOSPC, errno.EDQUOT) or disk_is_full(root):
        raise cannot_write(root.parent, errno.ENOSPC)
    kind = getattr(errors, error.get("class") or "", None)
    if isinstance(kind, type) and issubclass(kind, FlowExportError):
        raised = kind.__new__(kind)  # a subclass may build its message from other arguments
        FlowExportError.__init__(raised, error["message"], fix=error["fix"])
        raise raised
    raise ConversionError(f"{where}: {_death(what, code, error)}.{_tail(log)}")


def _run(command: list[str], log: Path, tick: Callable[[float], None] | None) -> tuple[int, bytes]:
    """Run a child to its end, or kill it and its children when interrupted."""
    reading, writing = os.pipe()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [*command, str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,  # the terminal's Ctrl-C reaches the parent alone
                env=environment,
            )
        os.close(writing)
        writing = -1
        try:
            answer = _collect(reading, child, tick)
            return child.wait(), answer
        except BaseException:
            _kill(child)
            raise
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def _collect(
    reading: int, child: subprocess.Popen[bytes], tick: Callable[[float], None] | None
) -> bytes:
    """Read the pipe until the child has ended or closed it."""
    answer = b""
    started = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.2):
                piece = os.read(reading, 1 << 16)
                if not piece:
                    return answer
                answer += piece
            elif child.poll() is not None:  # a grandchild may still hold the pipe
                return answer
            if tick is not None:
                tick(time.monotonic() - started)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _parse(answer: bytes) -> dict[str, Any] | None:
    try:
        result = json.loads(answer)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def _death(what: str, code: int, error: dict[str, Any]) -> str:
    if error.get("memory"):
        return f"{what} ran out of memory"
    if error:
        return f"{what} failed with {error['message'].rstrip('.')}"
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
        return f"{what}'s process was ended by {name}{hint}"
    return f"{what}'s process ended with code {code} and no result"


def _tail(log: Path) -> str:
    """Return the log's last lines, without the frames of a Python traceback."""
    try:
        text = log.read_bytes().decode(errors="replace")
    except OSError:
        return ""
    # A progress bar writes over itself; what stands at the end counts.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    kept: list[str] = []
    inside = False
    for line in lines:
        if line.lstrip().startswith("Traceback (most recent call last)"):
            inside = True
        elif not (inside and line.startswith(" ")):
            inside = False
            if line.strip():
                kept.append(line.rstrip())
    tail = kept[-LOG_LINES:]
    return " The log ends:\n" + "\n".join(f"  {line[:300]}" for line in tail) if tail else ""
