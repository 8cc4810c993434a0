"""The child process that runs one target's converter; see :mod:`flowexport.process`.

``python -m flowexport.worker REQUEST FD``: REQUEST is a JSON file, the
result goes as JSON to the open file descriptor FD, all else to stdout and stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowexport.core import errors
from flowexport.core.types import Options, Precision

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that ends.

    Where there is no such call (macOS) a thread watches the parent's id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Convert one program to one target; returns the artifact as JSON."""
    from flowexport.lowering import LoweredProgram
    from flowexport.ops.installed import installed_ops
    from flowexport.registry import TARGETS

    target = TARGETS.get(request["target"])
    program = LoweredProgram.load(Path(request["program"]), installed_ops())
    samples = request["calibration"]
    options = Options(
        Precision(request["precision"]),
        request["extra"],
        tuple(request["keep_float"]),
        None if samples is None else Path(samples),
        request["form_reason"],
    )
    if options.form_reason is not None:
        program = program.pinned_because(options.form_reason)
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    artifact = target.convert(program, options, out)
    return artifact.to_json(Path(request["root"]))


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an error for the parent to raise again; bugs carry only their text."""
    if isinstance(error, errors.FlowExportError):
        return {"class": type(error).__name__, "message": error.message, "fix": error.fix}
    lines = str(error).strip().splitlines() or [""]
    found: dict[str, Any] = {"class": None, "message": f"{type(error).__name__}: {lines[0]}"}
    if isinstance(error, OSError):
        found["errno"] = error.errno
    if isinstance(error, MemoryError):
        found["memory"] = True
    return found


def serve(arguments: list[str], work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Do a request of :func:`flowexport.process.run_child`; returns the exit code.

    Args:
        arguments: the request's file and the open descriptor for the result.
        work: takes the request, returns the result as JSON.
    """
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    die_with_parent(request["parent"])
    started = time.monotonic()
    result: dict[str, Any]
    try:
        result = {"result": work(request)}
    except Exception as error:
        traceback.print_exc()  # into the log, for whoever mends the converter
        result = {"error": describe_error(error)}
    result["seconds"] = time.monotonic() - started
    result["peak_rss_bytes"] = peak_rss_bytes()
    with os.fdopen(int(arguments[1]), "w", encoding="utf-8") as stream:
        json.dump(result, stream)
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], convert))
