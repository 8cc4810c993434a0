"""Runs a .tflite file with LiteRT's interpreter, on XNNPACK where it delegates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.types import Artifact, RuntimeInfo, Session
from flowexport.targets.tflite.flatbuffer import read_model

DELEGATE = "DELEGATE"


def open_interpreter(path: Path, threads: int) -> Any:
    """Return an interpreter with its tensors allocated.

    Raises:
        InputError: the file is missing, is no TFLite model, or the runtime refuses it.
    """
    from ai_edge_litert.interpreter import Interpreter

    read_model(path)  # the runtime does not check bounds
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"load tflite: {path} is refused by the runtime: {line}") from error
    return interpreter


def delegation(interpreter: Any) -> dict[str, Any]:
    """Return how the main graph was split between XNNPACK and TFLite's own kernels.

    Returns:
        ``{"delegate", "partitions", "delegated", "not_delegated": {operator: count}}``.
    """
    ops = interpreter._get_ops_details()  # no public API tells
    partitions = [op for op in ops if op["op_name"] == DELEGATE]
    plain = [op for op in ops if op["op_name"] != DELEGATE]
    producer = {int(t): op for op in plain for t in op["outputs"]}
    inside: set[int] = set()
    for part in partitions:
        edge = {int(t) for t in part["inputs"]}
        queue = [int(t) for t in part["outputs"]]
        while queue:
            tensor = queue.pop()
            op = producer.get(tensor)
            if tensor in edge or op is None or op["index"] in inside:
                continue
            inside.add(op["index"])
            queue += [int(t) for t in op["inputs"]]
    left = Counter(op["op_name"] for op in plain if op["index"] not in inside)
    return {
        "delegate": "XNNPACK" if partitions else None,
        "partitions": len(partitions),
        "delegated": len(inside),
        "not_delegated": dict(sorted(left.items())),
    }


class TFLiteSession(Session):
    """One signature of a .tflite file on the CPU."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact)
        self._interpreter: Any = open_interpreter(artifact.path, threads)
        signatures = self._interpreter.get_signature_list()
        name = artifact.entry if artifact.entry in signatures else next(iter(signatures))
        found = (set(signatures[name]["inputs"]), set(signatures[name]["outputs"]))
        wanted = ({s.name for s in artifact.inputs}, {s.name for s in artifact.outputs})
        if found != wanted:
            raise InputError(
                f"load tflite {artifact.model}: the file has inputs {sorted(found[0])} and"
                f" outputs {sorted(found[1])}; expected {sorted(wanted[0])} and"
                f" {sorted(wanted[1])}."
            )
        self._runner: Any = self._interpreter.get_signature_runner(name)
        self._info = RuntimeInfo(
            name="LiteRT",
            version=version("ai-edge-litert"),
            threads=threads,
            details=delegation(self._interpreter),
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        result: Mapping[str, np.ndarray] = self._runner(**feeds)
        return result

    def close(self) -> None:
        self._runner = self._interpreter = None
