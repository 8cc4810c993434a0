"""Core ML: values called by number, constants and blobs said once, and the table of modules."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from mobile_models import layer_feeds, layer_program

from flowexport.core.types import Artifact, Options, Precision
from flowexport.targets.coreml import TARGET, package
from flowexport.targets.coreml.interpreter import InterpreterSession
from flowexport.targets.coreml.names import shorten, table, unfold

pytest.importorskip("coremltools", reason="needs flowexport[coreml]")

WEIGHTS = Precision.INT8_WEIGHTS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    program = layer_program("timeseries", WEIGHTS)
    return TARGET.convert(program, Options(WEIGHTS), tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return the same package as coremltools leaves it."""
    program = layer_program("timeseries", WEIGHTS)
    out = tmp_path_factory.mktemp("plain")
    with (
        mock.patch("flowexport.targets.coreml.target.pack"),
        mock.patch("flowexport.targets.coreml.target.shorten", _as_they_are),
    ):
        return TARGET.convert(program, Options(WEIGHTS), out)


def _as_they_are(spec: Any) -> dict[str, dict[str, str]]:
    return {"main": {o.name: o.name for op in package.operations(spec) for o in op.outputs}}


def results(artifact: Artifact) -> dict[str, np.ndarray]:
    with InterpreterSession(artifact, "fp16") as session:
        return dict(session.run(layer_feeds()))


def test_the_numbers_are_the_same_and_the_file_is_smaller(made: Artifact, plain: Artifact) -> None:
    found, expected = results(made), results(plain)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    for told in ("operators", "scalars"):
        assert made.details[told] == plain.details[told]
    program, weights = (made.path / f for f in (package.MODEL_FILE, package.WEIGHTS_FILE))
    assert program.stat().st_size < 0.6 * (plain.path / package.MODEL_FILE).stat().st_size
    assert weights.stat().st_size < (plain.path / package.WEIGHTS_FILE).stat().st_size


def test_coremltools_reads_the_package(made: Artifact) -> None:
    import coremltools as ct

    model = ct.models.MLModel(str(made.path), skip_model_load=True)
    ends = model.get_spec().description
    assert [f.name for f in ends.input] == [s.name for s in made.inputs]
    assert [f.name for f in ends.output] == [s.name for s in made.outputs]


def test_every_constant_and_blob_is_there_once_under_a_short_name(made: Artifact) -> None:
    operations = list(package.operations(package.read_spec(made.path)))
    names = [o.name for op in operations for o in op.outputs]
    ends = {s.name for s in made.outputs}
    assert len(set(names)) == len(names) and ends <= set(names)
    assert all(len(name) <= 3 for name in names if name not in ends)
    values = [op.attributes["val"].SerializeToString() for op in operations if op.type == "const"]
    assert len(set(values)) == len(values) > 4
    weights = (made.path / package.WEIGHTS_FILE).read_bytes()
    held = [v for op in operations for v in op.attributes.values()]
    places = {v.blobFileValue.offset for v in held if v.WhichOneof("value") == "blobFileValue"}
    assert int.from_bytes(weights[:4], "little") == len(places)
    records = [package.BLOB.unpack_from(weights, place) for place in places]
    blobs = [weights[start : start + length] for _, _, length, start in records]
    assert len(set(blobs)) == len(blobs)
    points = [op for op in operations if op.type == "constexpr_affine_dequantize"]
    assert points and all(p.attributes["zero_point"].type.tensorType.rank == 0 for p in points)


def test_a_compressed_package_knows_its_modules(made: Artifact) -> None:
    spec = package.read_spec(made.path)
    paths = package.module_paths(spec, made.entry)
    kinds = {o.name: op.type for op in package.operations(spec) for o in op.outputs}
    assert set(paths) <= set(kinds)
    linear = [paths.get(name) for name, kind in kinds.items() if kind == "linear"]
    assert linear == ["qkv", "qkv", "qkv", "head"]


def test_runs_of_numbers_are_written_by_their_ends() -> None:
    names = {"a": "t0", "b": "t1", "c": "t2", "d": "c0", "e": "t9", "f": "ta", "g": "total"}
    paths = dict.fromkeys("abefg", "block") | {"c": "head", "lost": "head"}
    found = table({"forward": paths}, {"main": names})
    assert found == {"forward": {"block": "t0-t1 t9-ta total", "head": "t2"}}
    assert list(unfold("t0-t1 ty-t10 total")) == ["t0", "t1", "ty", "tz", "t10", "total"]


def test_outputs_keep_their_names_and_take_no_number() -> None:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    function = spec.mlProgram.functions["main"]
    function.opset = "CoreML5"
    function.inputs.add(name="t0")
    block = function.block_specializations["CoreML5"]
    block.outputs.append("t1")
    for name, read in (("sigmoid_cast_fp16", "t0"), ("relu", "sigmoid_cast_fp16"), ("t1", "relu")):
        operation = block.operations.add(type="relu")
        operation.inputs["x"].arguments.add(name=read)
        operation.outputs.add(name=name)
    assert shorten(spec) == {"main": {"sigmoid_cast_fp16": "t2", "relu": "t3", "t1": "t1"}}
    wired = [(op.inputs["x"].arguments[0].name, op.outputs[0].name) for op in block.operations]
    assert wired == [("t0", "t2"), ("t2", "t3"), ("t3", "t1")]


def test_a_program_with_inner_blocks_stays_as_it_is() -> None:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    function = spec.mlProgram.functions["main"]
    function.opset = "CoreML5"
    operation = function.block_specializations["CoreML5"].operations.add(type="cond")
    operation.outputs.add(name="chosen")
    operation.blocks.add().operations.add(type="identity").outputs.add(name="inner")
    before = spec.SerializeToString(deterministic=True)
    assert shorten(spec) == {"main": {"chosen": "chosen"}}
    assert spec.SerializeToString(deterministic=True) == before
