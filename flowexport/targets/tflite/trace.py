"""Every value that a TFLite file computes: the same file with all results as outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flowexport.core.types import Artifact
from flowexport.targets.tflite import flatbuffer
from flowexport.targets.tflite.session import file_feeds, open_interpreter


def trace(
    artifact: Artifact, feeds: Mapping[str, np.ndarray], threads: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, operator and array of every result, in execution order, as XNNPACK has them."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    model = flatbuffer.read_model(artifact.path)
    listed = flatbuffer.signatures(model)
    chosen = artifact.entry if artifact.entry in listed else listed[0]
    signature = model.signatureDefs[listed.index(chosen)]
    graph = model.subgraphs[signature.subgraphIndex]
    made = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        op_type = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")
        made += [(int(i), op_type) for i in operator.outputs]
    had = {int(o.tensorIndex): o.name.decode() for o in signature.outputs}
    keys = {}
    for index, _ in made:
        keys[index] = had.get(index, f"value_{index}")
        if index not in had:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = keys[index].encode(), index
            signature.outputs.append(entry)
    graph.outputs = np.array(
        [*graph.outputs, *(i for i, _ in made if i not in had)], dtype=np.int32
    )
    with tempfile.TemporaryDirectory(prefix="flowexport-trace-") as folder:
        path = Path(folder) / artifact.path.name
        flatbuffer.write_model(model, path, {})
        interpreter = open_interpreter(path, threads)
        results = interpreter.get_signature_runner(chosen)(**file_feeds(artifact, feeds))
    for index, op_type in made:
        label = graph.tensors[index].name.decode() or keys[index]
        yield label, op_type, results[keys[index]]
