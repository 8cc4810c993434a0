"""Bisection: a layer that is damaged in the finished file is named by its PyTorch module."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mutants_coreml
import mutants_families
import mutants_onnx
import mutants_tflite
import numpy as np
import pytest
from mutants import artifact_of, shared_bundle
from mutants_reach import SHORT, STEP
from once import session_folder
from way_tools import refused

from flowexport.bisect import rebuild
from flowexport.bundle import Bundle
from flowexport.cli import run
from flowexport.parity.bisect import Step, Value, bisect

MODULES: dict[str, Any] = {
    "onnx": mutants_onnx,
    "tflite": mutants_tflite,
    "coreml": mutants_coreml,
}
LAYERS = ("embed", "first.attention.out_projection", "second.expand")
Capture = pytest.CaptureFixture[str]


# The comparison on its own: arrays in, the first wrong step out.


def step(name: str, value: np.ndarray, *inputs: str, part: bool = False) -> Step:
    return Step(name, f"module.{name}", "op", value, inputs, part)


def chain(seed: int = 0) -> tuple[list[Step], list[Value]]:
    """Return a -> b -> c -> d, and a file that holds all but b, in other layouts."""
    rng = np.random.default_rng(seed)
    a, b, c, d = (rng.standard_normal((1, 4, 6, 5)) for _ in range(4))
    steps = [step("a", a), step("b", b, "a"), step("c", c, "b"), step("d", d, "c")]
    values = [
        Value("x", "conv", a.transpose(0, 2, 3, 1).astype(np.float32)),
        Value("y", "gemm", c.reshape(24, 5).astype(np.float32)),
        Value("z", "add", d.astype(np.float32)),
    ]
    return steps, values


def compare(steps: list[Step], values: list[Value], error: float) -> Any:
    return bisect(steps, values, function="f", case="c", tolerance=1e-5, output_error=error)


def test_layouts_and_fused_steps_of_a_healthy_file_are_right() -> None:
    steps, values = chain()
    found = compare(steps, values, 1e-7)
    assert found.healthy and found.first is None and found.jump is None
    assert [s.within for s in found.steps] == [True, False, True, True]
    assert all(s.right for s in found.steps)


def test_the_first_wrong_value_is_named_with_what_was_fused_before_it() -> None:
    steps, values = chain()
    wrong = values[1].array + np.float32(0.1)
    values[1:] = [Value("y", "gemm", wrong), Value("z", "add", values[2].array * np.float32(2))]
    found = compare(steps, values, 0.5)
    assert not found.healthy and found.first is not None
    # b has c's size: the file's nearest value to it is no right one.
    assert found.first.module in ("module.b", "module.c")
    assert found.steps[0].within and not found.steps[2].within and not found.steps[3].within


def test_a_wrong_part_is_told_by_the_whole_it_came_from() -> None:
    rng = np.random.default_rng(1)
    whole, end = rng.standard_normal((3, 8)), rng.standard_normal(4)
    parts = [whole[i] for i in range(3)]
    steps = [
        step("whole", whole),
        *(step(f"part{i}", p, "whole", part=True) for i, p in enumerate(parts)),
        step("end", end, "part0", "part1", "part2"),
    ]
    good = [Value(f"v{i}", "split", p.astype(np.float32)) for i, p in enumerate(parts)]
    right = compare(steps, [*good, Value("e", "add", end.astype(np.float32))], 1e-7)
    assert right.first is None
    bad = [Value("v0", "split", good[0].array * np.float32(2)), *good[1:]]
    found = compare(steps, [*bad, Value("e", "add", (end + 1).astype(np.float32))], 0.5)
    assert found.first is not None and found.first.name == "part0"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_never_right(value: float) -> None:
    steps, values = chain()
    values[2] = Value("z", "add", np.full((1, 4, 6, 5), value, np.float32))
    found = compare(steps, values, float("inf"))
    assert found.first is not None and found.first.name == "d" and found.first.error is None
    json.dumps(found.to_json(), allow_nan=False)


# The whole way, on files.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_bundle(session_folder(tmp_path_factory))


@pytest.fixture(scope="module")
def model(bundle: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutant_model", _file(bundle))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _file(bundle: Path) -> Path:
    return bundle.parent / "mutant_model.py"


def _arguments(bundle: Path, folder: Path, name: str) -> list[str]:
    source = f"{_file(folder)}:build"
    return ["bisect", str(bundle), "--target", name, "--model", source, "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_a_healthy_artifact_is_said_to_be_healthy(bundle: Path, name: str, capsys: Capture) -> None:
    assert run(_arguments(bundle, bundle, name)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is True and document["first"] is None
    seen = {s["module"] for s in document["steps"] if s["within"]}
    assert {"embed", "first.attention", "second.shrink", "logits", "other"} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_damaged_layer_is_named(
    bundle: Path, model: ModuleType, name: str, tmp_path: Path, capsys: Capture
) -> None:
    parameters = dict(model.build().named_parameters())
    for layer in LAYERS:
        copy = Path(shutil.copytree(bundle, tmp_path / layer))
        matrix = parameters[f"{layer}.weight"].detach().numpy()
        path = artifact_of(copy, name).path
        MODULES[name].damage_layer(path, matrix, lambda v: v * np.float32(1.05))
        assert run(_arguments(copy, bundle, name)) == 4
        document = json.loads(capsys.readouterr().out)
        assert document["first"] is not None, document["output_error"]
        assert document["first"]["module"] == layer
        assert document["first"]["operator"] == "linear"


# Other functions than forward.

DAMAGED = [("lengths", SHORT), ("stream", STEP)]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda family: shared_bundle(session_folder(tmp_path_factory), family)


def _owner(bundle: Path, source: str, matrix: np.ndarray) -> str:
    """Return the module whose weight this is, stored in few bits, in either order of its axes."""
    given = None if "stream" in bundle.parent.name else source
    subject = rebuild(Bundle.open(bundle).manifest, given)
    best: tuple[float, str] = (0.0, "")
    for name, parameter in subject.module.named_parameters():
        weight = parameter.detach().numpy()
        for turned in (weight, weight.T):
            if turned.shape == matrix.shape and name.endswith("weight"):
                found = np.corrcoef(turned.ravel(), matrix.astype(np.float64).ravel())[0, 1]
                best = max(best, (float(found), name.removesuffix(".weight")))
    assert best[0] > 0.9, best  # int8 with a scale for each column
    return best[1]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "function"), DAMAGED)
@pytest.mark.parametrize("name", MODULES)
def test_a_layer_of_another_function_is_named(
    families: Callable[[str], Path],
    family: str,
    function: str,
    name: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    bundle = families(family)
    source = f"{_file(bundle)}:{'build_small' if family == 'lengths' else 'build'}"
    base = ["--target", name, "--json", *(["--model", source] if family == "lengths" else [])]
    if name == "onnx":
        assert run(["bisect", str(bundle), *base, "--function", function]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["healthy"] is True and document["function"] == function
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    seen: list[np.ndarray] = []

    def negated(values: np.ndarray) -> np.ndarray:
        seen.append(values.copy())
        return -values

    reach = mutants_families.REACH[name]
    reach.weight(function, negated, artifact_of(copy, name).path)
    assert run(["bisect", str(copy), *base, "--function", function]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["function"] == function and document["first"] is not None
    assert document["first"]["module"] == _owner(bundle, source, seen[0])
    # Without the option the first function that fails is taken; Core ML's share the matrix.
    assert run(["bisect", str(copy), *base]) == 4
    document = json.loads(capsys.readouterr().out)
    own = artifact_of(copy, name).entry if name == "coreml" else function
    assert document["function"] == own


@pytest.mark.slow
def test_a_state_that_does_not_move_is_found_in_the_step(
    families: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    copy = Path(shutil.copytree(families("stream"), tmp_path / "copy"))
    mutants_families.REACH["onnx"].keep(artifact_of(copy, "onnx").path)
    assert run(["bisect", str(copy), "--target", "onnx", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["function"] == "step" and document["output_error"] > document["tolerance"]


@pytest.mark.slow
def test_what_bisect_refuses(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    source = ["--model", f"{_file(bundle)}:build"]
    base: list[object] = ["bisect", bundle, "--target", "onnx"]
    refused(capsys, 2, "came from a file", "--model", arguments=base)
    wrong = [*base, *source, "--function", "step"]
    refused(capsys, 2, "unknown function 'step'", "forward", arguments=wrong)
    refused(capsys, 2, "'nowhere'", "random-0", arguments=[*base, *source, "--case", "nowhere"])
    other = tmp_path / "mutant_model.py"
    other.write_text(_file(bundle).read_text().replace("manual_seed(7)", "manual_seed(8)"))
    words = ["weights have sha256", "expected"]
    refused(capsys, 2, *words, arguments=[*base, "--model", f"{other}:build"])
    refused(capsys, 2, "'tensor'", arguments=["bisect", bundle, "--target", "tensor", *source])
    refused(capsys, 2, "does not exist", arguments=["bisect", tmp_path / "x", "--target", "onnx"])
