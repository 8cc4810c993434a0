"""Reads, checks and rewrites a saved .mlpackage."""

from __future__ import annotations

import json
import shutil
import struct
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import TensorSpec
from flowexport.targets.coreml.names import unfold
from flowexport.targets.coreml.sdk import quiet

MODEL_FILE = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_FOLDER = "Data/com.apple.CoreML/weights"
WEIGHTS_FILE = f"{WEIGHTS_FOLDER}/weight.bin"
MANIFEST_FILE = "Manifest.json"
PREFIX = "flowexport."

# coremltools.libmilstoragepython: 64-byte records {sentinel, dtype, bytes, offset}.
BLOB = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
MIL_FLOAT16 = 10  # MIL.proto: DataType.FLOAT16
_NUMPY = {1: "?", 10: "<f2", 11: "<f4", 12: "<f8", 21: "<i1", 22: "<i2", 23: "<i4", 24: "<i8",
          31: "<u1", 32: "<u2", 33: "<u4", 34: "<u8"}  # fmt: skip
"""MIL.proto: DataType."""


def read_spec(path: Path) -> Any:
    """Return the package's ``Model`` message after checking that its weights are there.

    Raises:
        InputError: the path is no ML Program package, or a part is missing or cut.
    """
    if not path.exists():
        raise InputError(f"inspect coreml: {path} does not exist.")
    if not path.is_dir() or not (path / MANIFEST_FILE).is_file():
        raise InputError(f"inspect coreml: {path} is no .mlpackage (it has no {MANIFEST_FILE}).")
    quiet()
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        spec.ParseFromString((path / "Data" / root).read_bytes())
    except Exception as error:  # protobuf, JSON and missing files each raise their own
        raise InputError(
            f"inspect coreml: {path} is truncated or corrupt ({type(error).__name__}).",
            fix="convert it again",
        ) from error
    if spec.WhichOneof("Type") != "mlProgram" or not spec.mlProgram.functions:
        raise InputError(
            f"inspect coreml: {path} holds {spec.WhichOneof('Type')}; expected an ML Program."
        )
    _check_weights(path, spec)
    return spec


def write_spec(path: Path, spec: Any) -> None:
    """Write ``spec`` back, and name the package's items by their content.

    coremltools stamps random identifiers, the date and a debug map of names
    into every package; without them the same program gives the same bytes.
    """
    user = spec.description.metadata.userDefined
    user.pop("com.github.apple.coremltools.conversion_date", None)
    (path / MODEL_FILE).write_bytes(spec.SerializeToString(deterministic=True))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    items = {"model.mlmodel": ("CoreML Model Specification", MODEL_FILE)}
    content = sha256_file(path / MODEL_FILE)
    if (path / WEIGHTS_FILE).is_file():
        items["weights"] = ("CoreML Model Weights", WEIGHTS_FOLDER)
        content += sha256_file(path / WEIGHTS_FILE)
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_OID, name + content)): {
            "author": "com.apple.CoreML",
            "description": description,
            "name": name,
            "path": file.removeprefix("Data/"),
        }
        for name, (description, file) in items.items()
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
    (path / MANIFEST_FILE).write_text(json.dumps(manifest, indent=4) + "\n")


def remove(path: Path) -> None:
    """Delete a package that an earlier conversion left."""
    if path.is_dir():
        shutil.rmtree(path)


def operations(spec: Any) -> Iterator[Any]:
    """Yield every operation of every function, nested blocks included."""

    for function in spec.mlProgram.functions.values():
        yield from walk(function)


def walk(function: Any) -> Iterator[Any]:
    """Yield every operation of a function, nested blocks included."""

    def inside(block: Any) -> Iterator[Any]:
        for operation in block.operations:
            yield operation
            for inner in operation.blocks:
                yield from inside(inner)

    yield from inside(function.block_specializations[function.opset])


def operator_counts(spec: Any) -> dict[str, int]:
    """Return how often each operator occurs, constants aside."""
    counts = Counter(op.type for op in operations(spec))
    counts.pop("const", None)
    return dict(sorted(counts.items()))


def scalars(spec: Any) -> dict[str, int]:
    """Return how often each single float constant is read: ε, bounds of clamps, factors."""
    counts: Counter[str] = Counter()
    for function in spec.mlProgram.functions.values():
        counts += _scalars(list(walk(function)))
    return dict(sorted(counts.items()))


def _scalars(program: list[Any]) -> Counter[str]:
    read = Counter(
        b.name for op in program for argument in op.inputs.values() for b in argument.arguments
    )
    counts: Counter[str] = Counter()
    for op in program:
        value = op.attributes["val"] if op.type == "const" else None
        if value is None or value.WhichOneof("value") != "immediateValue":
            continue
        tensor, kind = value.immediateValue.tensor, value.type.tensorType
        times = read[op.outputs[0].name]
        if len(tensor.floats.values) == 1:
            counts[f"{tensor.floats.values[0]:.9g}"] += times
        elif kind.dataType == MIL_FLOAT16 and len(tensor.bytes.values) == 2:
            counts[f"{struct.unpack('<e', tensor.bytes.values)[0]:.9g}"] += times
    return counts


def constants(path: Path, spec: Any) -> dict[str, np.ndarray]:
    """Return the values of all constants, compressed ones as stored, by function and name.

    Those that an operator holds itself are there too. Values of fewer than 8 bits stay in
    their bytes.
    """
    file = path / WEIGHTS_FILE
    weights = file.read_bytes() if file.is_file() else b""
    found = {}
    for function in sorted(spec.mlProgram.functions):
        for op in walk(spec.mlProgram.functions[function]):
            for part, value in held_values(op):
                held = array(value, weights)
                if held is not None:
                    found[f"{function}/{op.outputs[0].name} {part}"] = held
    return found


def held_values(op: Any) -> list[tuple[str, Any]]:
    """Return the values that an operation holds itself, by attribute or argument, in order.

    From iOS 18 on the ``constexpr`` operators have arguments where they had attributes.
    """
    found = [(part, value) for part, value in op.attributes.items() if part != "name"]
    for part, argument in op.inputs.items():
        found += [(part, b.value) for b in argument.arguments if b.WhichOneof("binding") == "value"]
    return sorted(found, key=lambda pair: pair[0])


def array(value: Any, weights: bytes = b"") -> np.ndarray | None:
    """Return a tensor value flat; None for texts and lists."""
    dtype = np.dtype(_NUMPY.get(value.type.tensorType.dataType, np.uint8))
    if value.WhichOneof("value") == "blobFileValue":
        _, _, length, start = BLOB.unpack_from(weights, value.blobFileValue.offset)
        return np.frombuffer(weights, np.uint8, length, start).view(dtype)
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind in (None, "strings"):
        return None
    values = getattr(tensor, kind).values
    return np.frombuffer(values, dtype) if kind == "bytes" else np.array(values, dtype)


def rounding_inverses(spec: Any) -> list[tuple[str, float]]:
    """Return name and ε of each ``inverse`` that computes 1/(x + ε) with ε > 0."""
    constants = {op.outputs[0].name: op for op in operations(spec) if op.type == "const"}
    found = []
    for op in operations(spec):
        if op.type != "inverse":
            continue
        # Without the argument Core ML takes its default, 1e-4.
        epsilon = 1e-4
        if "epsilon" in op.inputs:
            argument = op.inputs["epsilon"].arguments[0]
            value = constants[argument.name].attributes["val"] if argument.name else argument.value
            epsilon = _scalar(value)
        if epsilon > 0:
            found.append((op.outputs[0].name, epsilon))
    return found


def functions(spec: Any) -> list[str]:
    """Return the names of a multifunction package's functions; of another, nothing."""
    return [f.name for f in spec.description.functions]


def features(spec: Any, function: str = "") -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the described inputs and outputs (those that are tensors).

    Args:
        function: of a multifunction package; the default one where empty.
    """
    from coremltools.proto import FeatureTypes_pb2

    names = {65568: "float32", 65600: "float64", 131104: "int32", 65552: "float16", 131080: "int8"}

    def tensors(described: Any) -> list[TensorSpec]:
        result = []
        for feature in described:
            if feature.type.WhichOneof("Type") != "multiArrayType":
                continue
            array = feature.type.multiArrayType
            kind = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name(array.dataType)
            dtype = names.get(array.dataType, kind.lower())
            result.append(TensorSpec(feature.name, tuple(array.shape), dtype))
        return result

    described = {f.name: f for f in spec.description.functions}
    name = function or spec.description.defaultFunctionName
    chosen = described.get(name, spec.description)
    return tensors(chosen.input), tensors(chosen.output)


def module_paths(spec: Any, function: str) -> dict[str, str]:
    """Return the PyTorch module path of a function's results, by name; empty where unknown."""
    table = user_metadata(spec).get("places", {})
    # A package of one function calls it ``main``.
    own = table.get(function) or (next(iter(table.values())) if len(table) == 1 else {})
    return {name: path for path, names in own.items() for name in unfold(names)}


def user_metadata(spec: Any) -> dict[str, Any]:
    """Return flowexport's own entries, decoded, without their prefix."""
    entries: Mapping[str, str] = spec.description.metadata.userDefined
    return {
        key.removeprefix(PREFIX): json.loads(value)
        for key, value in sorted(entries.items())
        if key.startswith(PREFIX)
    }


def _scalar(value: Any) -> float:
    tensor = value.immediateValue.tensor
    if tensor.WhichOneof("value") == "floats":
        return float(tensor.floats.values[0])
    (half,) = struct.unpack("<e", tensor.bytes.values[:2])
    return float(half)


def _check_weights(path: Path, spec: Any) -> None:
    """Raise InputError unless every constant kept in ``weight.bin`` lies inside it."""
    blobs = []
    for op in operations(spec):
        for _, value in held_values(op):
            if value.WhichOneof("value") == "blobFileValue":
                blobs.append((op.outputs[0].name, value.blobFileValue.offset))
    if not blobs:
        return
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise InputError(f"inspect coreml: {path} has no {WEIGHTS_FILE}.", fix="convert it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        for name, offset in blobs:
            stream.seek(offset)
            record = stream.read(BLOB.size)
            sentinel, _, length, start = (
                BLOB.unpack(record) if len(record) == BLOB.size else (0, 0, 0, 0)
            )
            if sentinel != _SENTINEL or start + length > size:
                raise InputError(
                    f"inspect coreml: {path} is truncated or corrupt: {WEIGHTS_FILE} lacks {name}.",
                    fix="convert it again",
                )
