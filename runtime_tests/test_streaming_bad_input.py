"""What cannot stream is refused with exit code 2 before any conversion begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from streaming_tools import write_recipe
from way_tools import refused

GPT = (
    "{family: flowformer-gpt, config: {vocab_size: 5, block_size: 8, n_layer: 1, n_head: 1,"
    " n_embd: 4}}"
)
CAUSAL = """
  family: flowformer-causal-timeseries
  config: {feat_dim: 3, max_len: 8, num_classes: 3, d_model: 8, n_heads: 2, num_layers: 1, d_ff: 8}
"""
VISION = """
  family: flowformer-timeseries
  config: {feat_dim: 3, max_len: 8, num_classes: 3, d_model: 8, n_heads: 2, num_layers: 1, d_ff: 8}
"""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            [("  onnx: {}\ntol", "  onnx: {}\n  tensorrt: {}\ntol")],
            ["tensorrt cannot carry the state", "coreml, onnx, tflite"],
        ),
        (
            [
                ("  onnx: {}\ntol", "  onnx: {precision: int8-weights}\ntol"),
                ("fp32: {", "int8-weights: {"),
            ],
            ["precision int8-weights; expected"],
        ),
        (
            [(CAUSAL.strip("\n"), VISION.strip("\n"))],
            ["FlowformerTimeSeries has no step with a state", "yaml:7"],
        ),
        (
            [("targets:", "inputs: {x: batchxframesx3}\ntargets:")],
            ["dynamic length 'frames'; expected a fixed one", "streaming: {lengths: [32, 1024]}"],
        ),
        (
            [("model:" + CAUSAL.rstrip("\n"), f"model: {GPT}"), ("[70]", "[9]")],
            ["idx has length 9; expected at most 8"],
        ),
        (
            [("  onnx: {}\ntol", "  onnx: {form: means}\ntol")],
            ["yaml:9: form of onnx is 'means'", "is causal; expected one of: causal_chunked,"],
        ),
        (
            [
                ("  onnx: {}\ntol", "  onnx: {form: causal_chunked}\ntol"),
                ("streaming: {lengths: [70]}", "streaming: false"),
                ("targets:", "inputs: {x: batchxframesx3}\ntargets:"),
            ],
            ["has a dynamic length; expected one of: causal_means, causal_triangular, published"],
        ),
        ([("{lengths: [70]}", "yes please")], ["streaming is 'yes please'; expected"]),
        ([("{lengths: [70]}", "{lengths: []}")], ["streaming.lengths"]),
        ([("{lengths: [70]}", "{lengths: [0]}")], ["streaming.lengths.0 is 0"]),
        ([("{lengths: [70]}", "{length: [4]}")], ["unknown key 'length' in streaming"]),
    ],
    ids=[
        "target", "precision", "model", "dynamic", "too-long", "form", "form-of-dynamic", "word",
        "empty", "zero", "key",
    ],
)  # fmt: skip
def test_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[tuple[str, str]],
    words: list[str],
) -> None:
    recipe = write_recipe(tmp_path, *changes)
    out = tmp_path / "bundle"
    refused(capsys, 2, *words, arguments=["convert", recipe, "--out", out])
    assert not out.exists()


def test_a_target_asked_for_on_the_command_line_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", write_recipe(tmp_path), "--target", "tensorrt", "--out", tmp_path / "b"]
    refused(capsys, 2, "target tensorrt cannot carry the state", arguments=arguments)


@pytest.mark.parametrize("target", ["tflite", "coreml"])
def test_a_dynamic_length_is_refused_before_anything_is_lowered(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ["--input", "x:batchxlengthx12", "--input", "padding_mask:batchxlength"]
    arguments = ["convert", "japanese-vowels", *shapes, "--target", target, "--out", tmp_path / "b"]
    words = [f"convert {target}", "x has dynamic dimension 'length' (axis 1)", "bucket"]
    refused(capsys, 2, *words, arguments=arguments)


def test_a_length_that_the_model_cannot_vary_is_told_with_its_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path,
        (CAUSAL.strip("\n"), VISION.strip("\n")),
        ("streaming: {lengths: [70]}", "inputs: {x: batchxframesx3, padding_mask: batchxframes}"),
    )
    words = ["does not take every 'frames'", "<= 8", "buckets: {frames: [N, M]}"]
    refused(capsys, 2, *words, arguments=["convert", recipe, "--out", tmp_path / "b"])
    assert not (tmp_path / "b").exists()


def test_an_older_system_than_functions_need_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "  onnx: {}\n  coreml: {deployment_target: iOS16}\ntol"
    recipe = write_recipe(tmp_path, ("  onnx: {}\ntol", old))
    words = ["deployment_target is iOS16; expected iOS18", "tiny-stream.yaml:10"]
    refused(capsys, 2, *words, arguments=["convert", recipe, "--out", tmp_path / "b"])
