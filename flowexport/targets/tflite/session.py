"""Runs a .tflite file with LiteRT's interpreter, on XNNPACK where it delegates."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.types import Artifact, RuntimeInfo, Session
from flowexport.targets.tflite.ends import ImageEnd
from flowexport.targets.tflite.flatbuffer import read_model, signatures, with_main

DELEGATE = "DELEGATE"


def open_interpreter(path: Path, threads: int) -> Any:
    """Return an interpreter with its tensors allocated.

    Raises:
        InputError: the file is missing, is no TFLite model, or the runtime refuses it.
    """
    from ai_edge_litert.interpreter import Interpreter

    read_model(path)  # the runtime does not check bounds
    try:
        with informed():
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"load tflite: {path} is refused by the runtime: {line}") from error
    return interpreter


@contextlib.contextmanager
def informed() -> Iterator[None]:
    """Turn the runtime's ``INFO:`` lines on stderr into log records; others stay there."""
    with contextlib.suppress(ValueError, OSError):  # a replaced stderr may have no descriptor
        sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        before = os.dup(2)
        try:
            os.dup2(kept.fileno(), 2)
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            for line in kept.read().decode(errors="replace").splitlines():
                if line.startswith("INFO: "):
                    logging.getLogger(__name__).info(line.removeprefix("INFO: "))
                else:
                    print(line, file=sys.stderr)


def delegations(path: Path) -> dict[str, dict[str, Any]]:
    """Return how each signature's graph was split; see :func:`delegation`."""
    from ai_edge_litert.interpreter import Interpreter

    model = read_model(path)
    found = {}
    for name in signatures(model):
        with informed():
            interpreter = Interpreter(model_content=with_main(model, name), num_threads=1)
            interpreter.allocate_tensors()
        found[name] = delegation(interpreter)
    return found


def delegation(interpreter: Any) -> dict[str, Any]:
    """Return how the main graph was split between XNNPACK and TFLite's own kernels.

    Returns:
        ``{"delegate", "partitions", "delegated", "not_delegated": {operator: count},
        "outside": [operator and its output's name, as many]}``.
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
    outside = [op for op in plain if op["index"] not in inside]
    left = Counter(op["op_name"] for op in outside)
    tensors = {int(t["index"]): str(t["name"]) for t in interpreter.get_tensor_details()}
    return {
        "delegate": "XNNPACK" if partitions else None,
        "partitions": len(partitions),
        "delegated": len(inside),
        "not_delegated": dict(sorted(left.items())),
        "outside": [
            f"{op['op_name']} {tensors.get(int(op['outputs'][0]), '')}".strip() for op in outside
        ],
    }


def file_feeds(artifact: Artifact, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the file takes for feeds of the artifact's specs."""
    found = dict(feeds)
    if "image" in artifact.details:
        end = ImageEnd.from_json(artifact.details["image"])
        name = end.spec.name
        found[name] = end.feed(feeds[name], f"run tflite {artifact.model}")
    return found


class TFLiteSession(Session):
    """One signature of a .tflite file on the CPU."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact)
        self._interpreter: Any = open_interpreter(artifact.path, threads)
        listed = self._interpreter.get_signature_list()
        name = artifact.entry if artifact.entry in listed else next(iter(listed))
        found = (set(listed[name]["inputs"]), set(listed[name]["outputs"]))
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
            # The runtime tells of the first graph alone.
            details=delegation(self._interpreter) if name == next(iter(listed)) else {},
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        result: Mapping[str, np.ndarray] = self._runner(**file_feeds(self.artifact, feeds))
        return result

    def close(self) -> None:
        self._runner = self._interpreter = None
