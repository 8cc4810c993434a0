"""Bad input before anything is converted: message, exit code, and nothing written."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from way_tools import RECIPE, names, refused, write_model

JV = "flowformer-timeseries-japanese-vowels"
Capture = pytest.CaptureFixture[str]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def state(width: int = 8) -> dict[str, torch.Tensor]:
    return {
        "qkv.weight": torch.ones(24, width),
        "qkv.bias": torch.zeros(24),
        "head.weight": torch.ones(3, 8),
        "head.bias": torch.zeros(3),
    }


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["missing", "expected a checkpoint file"]),
        ("truncated", ["truncated"]),
        ("truncated safetensors", ["truncated"]),
        ("text", ["no PyTorch checkpoint"]),
        ("empty", ["truncated"]),
        ("bomb", ["pickles Python objects", "Fix:"]),
        ("bare bomb", ["expected a complete"]),
        ("another model", ["belongs to another model", "patch_embed"]),
        ("another size", ["of another shape", "qkv.weight"]),
        ("not finite", ["not finite", "head.bias"]),
    ],
)
def test_checkpoint(tmp_path: Path, capsys: Capture, kind: str, words: list[str]) -> None:
    recipe = write_model(tmp_path)
    path, trace = tmp_path / "weights.pth", tmp_path / "exploded"
    if "truncated" in kind:
        if kind.endswith("safetensors"):
            from safetensors.torch import save_file

            path = tmp_path / "weights.safetensors"
            save_file(state(), path)
        else:
            torch.save(state(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("these are no weights")
    elif kind == "empty":
        path.touch()
    elif kind == "bomb":
        torch.save({"state_dict": Bomb(trace)}, path)
    elif kind == "bare bomb":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(trace)}))
    elif kind == "another model":
        torch.save({"patch_embed.proj.weight": torch.ones(2)}, path)
    elif kind == "another size":
        torch.save(state(9), path)
    elif kind == "not finite":
        torch.save({**state(), "head.bias": torch.full((3,), torch.nan)}, path)
    before = names(tmp_path)
    arguments: list[object] = ["convert", recipe, "--weights", path, "--out", tmp_path / "out"]
    refused(capsys, 2, str(path), *words, arguments=arguments)
    assert names(tmp_path) == before
    assert not trace.exists(), "the pickle ran"


@pytest.mark.parametrize(
    ("recipe", "extra", "words"),
    [
        (RECIPE.replace("targets:", "tagets:"), [], ["tiny.yaml:7", "did you mean 'targets'?"]),
        (RECIPE.replace("onnx: {}", "onnx: {opsett: 3}"), [], ["tiny.yaml:8", "opsett", "opset"]),
        (RECIPE.replace("onnx: {}", "onnx: {form: fast}"), [], ["tiny.yaml:8", "'fast'"]),
        (
            RECIPE.replace("onnx: {}", "onnx: {form: causal_chunked}"),
            [],
            ["tiny.yaml:8", "is not causal; expected one of: channel_first,", "drop `form`"],
        ),
        (RECIPE, ["--target", "onx"], ["unknown target 'onx'", "did you mean 'onnx'?"]),
        (RECIPE, ["--require", "onx"], ["unknown target 'onx'"]),
        (RECIPE, ["--precision", "int8"], ["unknown precision 'int8'", "fp16, fp32"]),
        (RECIPE, ["--precision", "fp16"], ["tolerances", "fp16"]),
        (RECIPE, ["--input", "x:batchx6x9"], ["forward refuses", "batchx6x9"]),
        (RECIPE, ["--input", "x:6x8"], ["forward refuses the input x 6x8"]),
        (RECIPE, ["--input", "x:1x6.5"], ["'6.5'"]),
        (RECIPE, ["--input", "1x6x8"], ["expected NAME:SHAPE"]),
        (RECIPE, ["--input", "x:1x6x8", "--input", "x:1x6x8"], ["given twice"]),
        (RECIPE, ["--threads", "0"], ["threads"]),
        (RECIPE.replace("[scores]", "[a, b]"), [], ["tiny.yaml:5", "2 names", "expected 1"]),
        (RECIPE.replace(":build", ":bild"), [], ["unknown factory 'bild'", "'build'?"]),
        (RECIPE.replace(":build", ":SIZE"), [], ["unknown factory 'SIZE'"]),
        (RECIPE.replace(":build", ":no_module"), [], ["returned a int", "torch.nn.Module"]),
        (RECIPE.replace(":build", ":raising"), [], ["no weights here", "(line 23)"]),
        (RECIPE.replace("tiny_model.py", "none.py"), [], ["none.py: does not exist"]),
        (RECIPE.replace("inputs: {x: batchx6x8}\n", ""), [], ["inputs are unknown", "--input"]),
    ],
)
def test_recipe_and_options(
    tmp_path: Path, capsys: Capture, recipe: str, extra: list[object], words: list[str]
) -> None:
    path = write_model(tmp_path, recipe)
    before = names(tmp_path) | {"__pycache__"}
    arguments: list[object] = ["convert", path, "--out", tmp_path / "out", *extra]
    refused(capsys, 2, *words, arguments=arguments)
    assert names(tmp_path) <= before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("japanese-vowel", ["unknown recipe or model", "did you mean 'japanese-vowels'?"]),
        ("none/of/this.yaml", ["none/of/this.yaml", "No such file"]),
        ("none/of/this.py:build", ["does not exist"]),
        ("none.py", ["names no factory"]),
    ],
)
def test_sources(
    tmp_path: Path,
    capsys: Capture,
    source: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, 2, *words, arguments=["convert", source, "--input", "x:1x2"])
    assert names(tmp_path) == set()


def test_a_registered_models_inputs_have_names(tmp_path: Path, capsys: Capture) -> None:
    arguments: list[object] = ["convert", JV, "--input", "y:1x29x12", "--out", tmp_path / "o"]
    refused(capsys, 2, "unknown input 'y'", "padding_mask, x", arguments=arguments)


def test_a_syntax_error_names_its_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "m.py").write_text("import torch\ndef build(:\n")
    source = f"{tmp_path / 'm.py'}:build"
    refused(capsys, 2, "SyntaxError", "line 2", arguments=["convert", source, "--input", "x:1x2"])


def test_output_folder_that_exists(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    recipe = write_model(tmp_path)
    for extra, word in (([], "--force"), (["--force"], "no bundle")):
        arguments: list[object] = ["convert", recipe, "--out", out, *extra]
        refused(capsys, 2, str(out), word, arguments=arguments)
    assert (out / "mine.txt").read_text() == "keep me"


def test_output_folder_that_cannot_be_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_model(tmp_path)
    (tmp_path / "file").touch()
    arguments: list[object] = ["convert", recipe, "--out", tmp_path / "file" / "out"]
    refused(capsys, 2, "no folder", arguments=arguments)

    if os.geteuid() == 0:  # root may write anywhere, so the system's answer is given by hand
        real = Path.mkdir

        def mkdir(path: Path, *a: object, **k: object) -> None:
            if path.name.startswith(".out.partial"):
                raise PermissionError(13, "Permission denied", str(path))
            real(path, *a, **k)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "mkdir", mkdir)
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "locked").mkdir(exist_ok=True)
    arguments = ["convert", recipe, "--out", tmp_path / "locked" / "out"]
    refused(capsys, 2, "permission is denied", "--out", arguments=arguments)
    assert names(tmp_path / "locked") == set()


@pytest.mark.parametrize("verb", ["verify", "bench", "report", "inspect"])
def test_a_path_that_is_no_bundle(tmp_path: Path, capsys: Capture, verb: str) -> None:
    refused(capsys, 2, "manifest.json", arguments=[verb, tmp_path])
    refused(capsys, 2, "does not exist", arguments=[verb, tmp_path / "none"])
    (tmp_path / "file.txt").write_text("text")
    refused(capsys, 2, "file.txt", arguments=[verb, tmp_path / "file.txt"])


@pytest.mark.parametrize("content", [b"", b"this is no model", b"\x08\x07" + b"\xff" * 400])
def test_an_onnx_file_that_is_none(tmp_path: Path, capsys: Capture, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(capsys, 2, "model.onnx", arguments=["inspect", path])
