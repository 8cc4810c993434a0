"""The kernel's checks under NVIDIA's compute-sanitizer: bad accesses, races, unset memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowexport.core.errors import UnavailableError
from flowexport.ops.flow_attention.tensorrt.build import packaged_toolkits

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86
"""Exit code by which the sanitizer says that it found something."""

MOST_TOKENS = 1000  # a tool slows a kernel down a hundredfold; every path is taken below this


@dataclass
class ToolRun:
    """What one tool said; ``said`` is its last line where it is not clean."""

    tool: str
    clean: bool
    said: str


def find_sanitizer() -> str:
    """Return the path of compute-sanitizer.

    Raises:
        UnavailableError: it is not on PATH, in ``$CUDA_HOME/bin`` or from PyPI.
    """
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *packaged_toolkits()]
    for name in ("compute-sanitizer", *(str(h / "bin" / "compute-sanitizer") for h in homes)):
        if found := shutil.which(name):
            return found
    raise UnavailableError(
        "benchmark kernel: no compute-sanitizer on PATH; expected that of the CUDA toolkit.",
        fix="pip install nvidia-cuda-sanitizer-api, or set CUDA_HOME to a toolkit that has it",
    )


def command(
    tool: str, sanitizer: str, library: Path, variants: Sequence[str], dtypes: Sequence[str]
) -> list[str]:
    """Return the command that checks a compiled kernel under one tool.

    initcheck watches this library's kernels alone: torch leaves padding of its own unset.
    """
    only = ["--kernel-name", "kernel_substring=flowexport"] if tool == "initcheck" else []
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *only),
        *("--target-processes", "all", sys.executable),
        *("-m", "flowexport.ops.flow_attention.tensorrt.benchmark", "--check-only"),
        *("--library", str(library), "--max-tokens", str(MOST_TOKENS)),
        *("--variants", ",".join(variants), "--dtypes", ",".join(dtypes)),
    ]


def sanitize(library: Path, variants: Sequence[str], dtypes: Sequence[str]) -> list[ToolRun]:
    """Check a compiled CUDA library under every tool, each in a process of its own.

    Raises:
        UnavailableError: there is no compute-sanitizer.
    """
    sanitizer = find_sanitizer()
    runs = []
    for tool in TOOLS:
        asked = command(tool, sanitizer, library, variants, dtypes)
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing was said"]
        said = next((x for x in reversed(lines) if "ERROR SUMMARY" in x), lines[-1])
        runs.append(ToolRun(tool, done.returncode == 0, f"exit code {done.returncode}: {said}"))
    return runs
