"""Recipes: what is read, and what each mistake is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from way_tools import RECIPE, write_model

from flowexport.core.errors import FlowExportError, RecipeError, UnknownNameError
from flowexport.core.reports import Tolerance
from flowexport.core.types import Precision, TensorSpec
from flowexport.recipes import (
    DEFAULT_TOLERANCES,
    Recipe,
    hash_json,
    load_recipe,
    parse_shape,
    recipe_schema,
)
from flowexport.registry import DATASETS, MODELS, TARGETS
from flowexport.resolve import find_recipe, shipped_recipes

TARGET_NAMES = ("coreml", "onnx", "tensorrt", "tflite")


def load(folder: Path, text: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(path, TARGET_NAMES)


def test_recipe_becomes_a_value(tmp_path: Path) -> None:
    recipe = load_recipe(write_model(tmp_path), TARGET_NAMES)
    assert recipe.name == "tiny"
    assert recipe.model.file == tmp_path / "tiny_model.py" and recipe.model.factory == "build"
    assert recipe.inputs == (TensorSpec("x", ("batch", 6, 8)),)
    assert recipe.tolerance("onnx", Precision.FP32)["max_rel"] == 1e-5
    assert recipe.fusions == {"onnx": {"FlowAttention": 1}}
    assert recipe.bench.min_runs == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("targets:", "tagets:", ["r.yaml:7", "unknown key 'tagets'", "did you mean 'targets'?"]),
        ("onnx: {}", "onx: {}", ["r.yaml:8", "unknown target 'onx'", "did you mean 'onnx'?"]),
        ("onnx: {}", "onnx: {precision: fp8}", ["r.yaml:8", "'fp8'", "fp32, fp16"]),
        (", reason: one layer of short sums in fp32", "", ["r.yaml:10", "has no reason"]),
        ("max_rel: 1.0e-5", "max_rel: tight", ["r.yaml:10", "max_rel is 'tight'", "a number"]),
        ("max_rel: 1.0e-5", "max_rel: -1", ["r.yaml:10", "more than 0"]),
        ("max_rel: 1.0e-5", "max_rell: 1", ["unknown key 'max_rell' in tolerances.fp32"]),
        ("batchx6x8", "batchx6x-8", ["r.yaml:4", "'-8'", "batchx128x12"]),
        ("batchx6x8", "1x6x8:float23", ["unknown dtype 'float23'", "did you mean 'float32'?"]),
        ("/1", "/9", ["r.yaml:1", "'flowexport.recipe/9'", "flowexport.recipe/1"]),
        ("model: ", "#", ["has no 'model'"]),
        ("tiny_model.py:build", "tiny_model.py", ["r.yaml:3", "names no factory"]),
        ("name: tiny", "name: ../up", ["r.yaml:2", "name is '../up'"]),
        ("min_runs: 3", "min_runs: 0", ["bench.min_runs is 0", "at least 1"]),
        ("labels: [a, b, c]", "labels: {a: 1}", ["r.yaml:6", "expected a list"]),
        ("labels:", "name: again\nlabels:", ["r.yaml:6", "there twice", "line 2"]),
        ("[a, b, c]", "[a, b", ["r.yaml:7", "expected YAML"]),
        ("[a, b, c]", "!!python/object/apply:os.system [ls]", ["r.yaml:6", "has the tag"]),
        ("[a, b, c]", "!!python/name:os.system x", ["r.yaml:6", "has the tag"]),
        ("[a, b, c]", "[!secret a]", ["r.yaml:6", "has the tag '!secret'"]),
        (
            "min_top1_agreement: 1.0",
            "max_accuracy_drop: 1",
            ["r.yaml:10", "limits the accuracy", "evaluation"],
        ),
    ],
)
def test_each_mistake_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert old in RECIPE
    with pytest.raises((RecipeError, UnknownNameError)) as caught:
        load(tmp_path, RECIPE.replace(old, new, 1))
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_come_at_once_in_the_files_order(tmp_path: Path) -> None:
    text = RECIPE.replace("targets:", "tagets:").replace("min_runs: 3", "min_runs: 0")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    lines = caught.value.message.splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["7", "13"]


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    with pytest.raises(RecipeError, match="alias"):
        load(tmp_path, bomb)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"[1, 2]", b"x" * (2 << 20)])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path, TARGET_NAMES)


def test_numbers_are_read_as_yaml_1_2_has_them(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE.replace("1.0e-5", "1e-5"))
    assert recipe.tolerance("onnx", Precision.FP32)["max_rel"] == 1e-5


def test_a_precision_without_tolerance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="fp16"):
        load(tmp_path, RECIPE).tolerance("onnx", Precision.FP16)


def test_a_targets_own_tolerance_wins(tmp_path: Path) -> None:
    own = "{tolerance: {max_rel: 0.5, reason: this target rounds the weights}}"
    recipe = load(tmp_path, RECIPE.replace("onnx: {}", f"onnx: {own}"))
    assert recipe.tolerance("onnx", Precision.FP32)["max_rel"] == 0.5
    assert recipe.tolerance("tflite", Precision.FP32)["max_rel"] == 1e-5
    assert "tolerance" not in recipe.options("onnx").extra


def test_the_hash_knows_no_path_but_every_setting(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    a = load_recipe(write_model(first), TARGET_NAMES).to_json("w", "f")
    b = load_recipe(write_model(second), TARGET_NAMES).to_json("w", "f")
    assert hash_json(a) == hash_json(b)
    changed = load_recipe(write_model(second, RECIPE.replace("1.0e-5", "2.0e-5")), TARGET_NAMES)
    assert hash_json(changed.to_json("w", "f")) != hash_json(a)
    assert hash_json(changed.to_json("v", "f")) != hash_json(changed.to_json("w", "f"))
    assert str(tmp_path) not in json.dumps(a)


@pytest.mark.parametrize("text", ["", "x", "1xx2", "0x3", "1x2.5", "-1x3", "1x2:"])
def test_shapes_that_are_none(text: str) -> None:
    if text in ("x",):
        text = "xx"
    if text == "1x2:":
        assert parse_shape("x", text).dtype == "float32"
        return
    with pytest.raises(FlowExportError, match="dimension"):
        parse_shape("x", text)


def test_shapes_that_are_some() -> None:
    assert parse_shape("x", "1x128x12") == TensorSpec("x", (1, 128, 12))
    assert parse_shape("ids", "batchx64:int64") == TensorSpec("ids", ("batch", 64), "int64")


def test_default_tolerances_are_whole() -> None:
    for precision in Precision:
        tolerance = Tolerance.from_json(DEFAULT_TOLERANCES[precision.value])
        assert tolerance.reason


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


def test_shipped_recipes_are_there() -> None:
    assert {"japanese-vowels", "digits", "flowformer-vision-224"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_holds(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.description
    streams = isinstance(recipe.streaming, tuple)  # floats, and where a state can be carried
    every = {"onnx", "tflite", "coreml", "tensorrt"}
    assert set(recipe.targets or ()) == (every - {"tensorrt"} if streams else every)
    for precision in [Precision.FP32, Precision.FP16] if streams else Precision:
        assert Tolerance.from_json(recipe.tolerance("onnx", precision)).reason
    assert recipe.model.name in MODELS.names()
    assert recipe.dataset is None or recipe.dataset in DATASETS.names()
    for target in set(recipe.targets or ()) & set(TARGETS.working()):
        TARGETS.get(target).validate(recipe.options(target))
