"""Every value that an ONNX file computes: the file's own operators, each result an output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from flowexport.core.types import Artifact, TensorSpec
from flowexport.targets.onnx.read import read_model
from flowexport.targets.onnx.session import OnnxSession


def trace(
    artifact: Artifact, feeds: Mapping[str, np.ndarray], threads: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, operator and array of every result, in execution order.

    An attention node counts as one operator. ONNX Runtime fuses less than in
    the file as it is, because every result has to be there.
    """
    import onnx

    model = read_model(artifact.path)
    known = {o.name for o in model.graph.output}
    made = [(name, node.op_type) for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n, _ in made if n not in known)
    with tempfile.TemporaryDirectory(prefix="flowexport-trace-") as folder:
        path = Path(folder) / artifact.path.name
        path.write_bytes(model.SerializeToString())
        outputs = tuple(TensorSpec(name, ()) for name, _ in made)
        with OnnxSession(replace(artifact, path=path, outputs=outputs), threads) as session:
            results = session.run(feeds)
    for name, op_type in made:
        yield name, op_type, results[name]
