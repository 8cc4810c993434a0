"""Child process of the comparison: a stock export, or the peak memory of one artifact."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from flowexport.worker import serve

RUNS = 5
RUNTIMES = {"onnx": "onnxruntime", "tflite": "ai_edge_litert.interpreter"}


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Do a request by its ``task``; see :func:`flowexport.worker.serve`."""
    return {"stock": _stock, "memory": _memory}[request["task"]](request)


def _stock(request: dict[str, Any]) -> dict[str, Any]:
    from flowexport.baseline.stock import export_stock
    from flowexport.core.types import TensorSpec

    root = Path(request["root"])
    path = Path(request["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact = export_stock(
        request["target"],
        Path(request["program"]),
        request["model"],
        [TensorSpec.from_json(s) for s in request["inputs"]],
        [TensorSpec.from_json(s) for s in request["outputs"]],
        path,
    )
    return artifact.to_json(root)


def _memory(request: dict[str, Any]) -> dict[str, Any]:
    """Load an artifact, run it, and say how much memory that took at its peak.

    ``extra_bytes`` counts loading and running, so what the runtime itself takes for any file
    as well; ``run_extra_bytes`` what running takes above the loaded session.
    """
    import numpy as np

    from flowexport.core.types import Artifact
    from flowexport.registry import TARGETS

    artifact = Artifact.from_json(request["artifact"], Path(request["root"]))
    target = TARGETS.get(artifact.target)
    import_module(RUNTIMES[artifact.target])  # the same for all, and none of the model's
    with np.load(request["feeds"]) as file:
        feeds = {name: file[name] for name in file.files}
    status = Path("/proc/self/status")
    if not status.is_file():
        return {"extra_bytes": None, "run_extra_bytes": None}
    peak_anew = Path("/proc/self/clear_refs")
    peak_anew.write_text("5")  # the peak begins anew at what is resident now
    before = _kilobytes(status, "VmRSS")
    with target.load(artifact, threads=request["threads"]) as session:
        loading, loaded = _kilobytes(status, "VmHWM"), _kilobytes(status, "VmRSS")
        peak_anew.write_text("5")
        for _ in range(RUNS):
            session.run(feeds)
        running = _kilobytes(status, "VmHWM")
    return {
        "extra_bytes": (max(loading, running) - before) * 1024,
        "run_extra_bytes": (running - loaded) * 1024,
    }


def _kilobytes(status: Path, key: str) -> int:
    line = next(x for x in status.read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1])


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], work))
