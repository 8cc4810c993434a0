"""Runs one model in another Python: standard library, numpy and the model's runtime alone.

``python server.py SITE KIND FILE ENTRY THREADS``. SITE is a folder of packages.
Feeds come on standard input: a line of JSON, ``[[name, dtype, shape], ...]``, and
the arrays' bytes one after the other. An answer is one line of JSON; one with
``results`` is followed by bytes in the same way. Ends with standard input.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

Loaded = tuple[Callable[[dict[str, Any]], dict[str, Any]], str, str, dict[str, Any]]
"""What runs feeds, and the runtime's name, version and details."""


def main() -> None:
    site, kind, path, entry, threads = sys.argv[1:6]
    sys.path.insert(0, site)
    # Runtimes print to standard output, which belongs to the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def tell(*arrays: bytes, **answer: Any) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.writelines(arrays)
        answers.flush()

    try:
        import numpy as np

        run, name, version, details = {"onnx": onnx, "tflite": tflite}[kind](
            path, entry, int(threads)
        )
    except Exception as error:
        tell(error=first_line(error))
        return
    tell(
        name=name,
        version=version,
        details={
            **details,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    )
    feeds_in = sys.stdin.buffer
    while line := feeds_in.readline():
        feeds = {
            name: np.frombuffer(feeds_in.read(length(dtype, shape)), dtype).reshape(shape)
            for name, dtype, shape in json.loads(line)
        }
        try:
            results = {n: np.ascontiguousarray(v) for n, v in run(feeds).items()}
            told = [[n, v.dtype.str, v.shape] for n, v in results.items()]
            tell(*(v.tobytes() for v in results.values()), results=told)
        except Exception as error:
            tell(error=first_line(error))


def length(dtype: str, shape: list[int]) -> int:
    """Return the bytes of an array; ``dtype`` as numpy writes it, ``<f4``."""
    return math.prod(shape) * int(dtype[2:])


def onnx(path: str, entry: str, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(names, feeds)))  # noqa: B905 - Python 3.9

    return run, "onnxruntime", onnxruntime.__version__, {"providers": session.get_providers()}


def tflite(path: str, entry: str, threads: int) -> Loaded:
    from importlib.metadata import version

    try:
        from ai_edge_litert.interpreter import Interpreter

        name, found = "LiteRT", version("ai-edge-litert")
    except ImportError:
        from tflite_runtime.interpreter import Interpreter

        name, found = "tflite-runtime", version("tflite-runtime")
    interpreter = Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    signatures = list(interpreter.get_signature_list())
    runner = interpreter.get_signature_runner(entry if entry in signatures else signatures[0])
    partitions = [o for o in interpreter._get_ops_details() if o["op_name"] == "DELEGATE"]
    details = {"delegate": "XNNPACK" if partitions else None, "partitions": len(partitions)}

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(runner(**feeds))

    return run, name, found, details


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


if __name__ == "__main__":
    main()
