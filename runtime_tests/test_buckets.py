"""Length buckets: functions that share weights, held to the reference at their own length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowexport_models import build_model
from streaming_tools import changed

import flowexport
from flowexport import parity
from flowexport.bundle import Bundle
from flowexport.core.errors import InputError, RecipeError
from flowexport.core.types import Dataset, Options, TensorSpec, Verdict
from flowexport.lowering import LoweredProgram, lower_buckets
from flowexport.ops.installed import installed_ops
from flowexport.plan import make_plan
from flowexport.recipes import load_recipe
from flowexport.registry import TARGETS
from flowexport.report.lengths import lengths
from flowexport.resolve import resolve

RECIPE = """schema: flowexport.recipe/1
name: tiny-buckets
model:
  family: flowformer-timeseries
  config: {feat_dim: 3, max_len: 12, num_classes: 3, d_model: 8, n_heads: 2, num_layers: 1, d_ff: 8}
weights: {random: 0}
inputs: {x: batchxlengthx3, padding_mask: batchxlength}
buckets: {length: [5, 12]}
targets:
  onnx: {}
tolerances:
  fp32: {max_rel: 1.0e-5, reason: one short layer in fp32}
bench: {warmup: 1, min_runs: 3, min_seconds: 0}
"""
SIZES = {"feat_dim": 3, "max_len": 12, "num_classes": 3, "d_model": 8, "n_heads": 2}


def write(folder: Path, *changes: tuple[str, str]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(changed(RECIPE, *changes))
    return path


def inputs(length: int) -> tuple[TensorSpec, ...]:
    return TensorSpec("x", ("batch", length, 3)), TensorSpec("padding_mask", ("batch", length))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> flowexport.pipeline.Result:
    folder = tmp_path_factory.mktemp("buckets")
    return flowexport.convert(write(folder), out=folder / "bundle")


def test_manifest_and_report_tell_every_length(result: Any) -> None:
    manifest = result.manifest
    assert manifest["buckets"] == {"dimension": "length", "lengths": [5, 12]}
    assert [s["shape"] for s in manifest["inputs"]] == [["batch", 12, 3], ["batch", 12]]
    entry = manifest["targets"]["onnx"]
    assert entry["entry"] == "forward_12" and list(entry["functions"]) == ["forward_5"]
    assert entry["functions"]["forward_5"]["inputs"][1]["shape"] == ["batch", 5]
    report = result.parity["onnx"]
    assert report.verdict is Verdict.PASS, report.reason
    names = {c.case for c in report.cases}
    assert {"random-1", "forward_5/random-1", "forward_5/one-step", "forward_5/batch-3"} <= names
    times = result.latency["onnx"]
    assert list(times.lengths) == ["forward_5"] and len(times.lengths["forward_5"]) >= 3
    assert type(times).from_json(times.to_json()) == times
    again = flowexport.verify(result.bundle).parity["onnx"]
    assert again.verdict is Verdict.PASS and {c.case for c in again.cases} == names


def test_a_damaged_shorter_length_fails_verification(result: Any, tmp_path: Path) -> None:
    """Negative control: the reference of the shorter length is really compared."""
    root, key = result.bundle, result.manifest["recipe_sha256"]
    golden = parity.read_golden(root / "golden", subject=key)
    (bucket,) = parity.read_buckets(root, [5, 12], None, subject=key)
    expected = {c: {n: v + 0.01 for n, v in o.items()} for c, o in bucket.golden.expected.items()}
    wrong = replace(bucket, golden=replace(bucket.golden, expected=expected))
    artifact = Bundle.open(root).artifacts()["onnx"]
    limits = parity.Tolerance(max_rel=1e-5, reason="test")
    report = parity.verify_artifact(
        TARGETS.get("onnx"), artifact, golden, None, limits, buckets=[wrong]
    )
    assert report.verdict is Verdict.FAIL
    broken = {c.case for c in report.cases if c.violation(limits)}
    assert broken == {f"forward_5/{c}" for c in expected}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tflite", "coreml"])
def test_lengths_are_functions_of_one_file_that_share_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("flowformer-timeseries", **SIZES, num_layers=1, d_ff=2048).eval()
    ops = installed_ops()

    def lowered(*lengths: int) -> LoweredProgram:
        buckets = {n: inputs(n) for n in lengths}
        return lower_buckets(model, buckets, ["logits"], name="tiny", ops=ops)

    target = TARGETS.get(name)
    (tmp_path / "one").mkdir()
    one = target.convert(lowered(12), Options(), tmp_path / "one")
    artifact = target.convert(lowered(5, 12), Options(), tmp_path)
    assert artifact.entry == "forward_12" and list(artifact.functions) == ["forward_5"]
    assert artifact.functions["forward_5"].path == artifact.path
    weights = sum(4 * p.numel() for p in model.parameters())
    assert one.size_bytes > weights > 100_000
    assert artifact.size_bytes < one.size_bytes + 0.6 * weights, "the weights are there once"
    rng = np.random.default_rng(0)
    for length in (5, 12):
        x = rng.standard_normal((1, length, 3)).astype(np.float32)
        mask = (np.arange(length) < length - 2)[None].astype(np.float32)
        with torch.no_grad():
            truth = model.double()(torch.from_numpy(x).double(), torch.from_numpy(mask).double())
        model.float()
        with target.load(artifact.function(f"forward_{length}")) as session:
            found = session.run({"x": x, "padding_mask": mask})["logits"]
            assert np.abs(found - truth.numpy()).max() <= 1e-5 * np.abs(truth.numpy()).max()
            with pytest.raises(InputError, match="x has shape 1x7x3; expected"):
                session.run({"x": x[:, :1].repeat(7, 1), "padding_mask": mask[:, :1].repeat(7, 1)})


def test_steps_that_are_not_there_weigh_as_padded_ones() -> None:
    """With the attention's output made zero only the padding in the head is left: no difference."""
    torch.manual_seed(0)
    model = build_model("flowformer-timeseries", **SIZES, num_layers=1, d_ff=8).eval()
    attention = model.encoder.attn_layers[0].attention
    with torch.no_grad():
        for p in attention.out_projection.parameters():
            p.zero_()
        x, mask = torch.randn(2, 12, 3), torch.zeros(2, 12)
        mask[:, :4] = 1
        whole, cut = model(x, mask), model(x[:, :5], mask[:, :5])
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_samples_are_cut_and_padded_by_their_real_steps() -> None:
    x = np.arange(1, 19, dtype=np.float32).reshape(3, 6, 1)
    mask = (np.arange(6) < np.array([[2], [5], [6]])).astype(np.float32)
    data = Dataset("d", {"x": x, "padding_mask": mask}, np.array([0, 1, 2]), (), "")

    def specs(n: int) -> list[TensorSpec]:
        return [TensorSpec("x", ("batch", n, 1)), TensorSpec("padding_mask", ("batch", n))]

    short, kept = parity.fit_lengths(data, specs(5))
    assert kept.tolist() == [0, 1] and short.targets.tolist() == [0, 1]
    assert np.array_equal(short.inputs["x"], x[:2, :5])
    assert short.inputs["padding_mask"].sum(axis=1).tolist() == [2, 5]
    long, kept = parity.fit_lengths(data, specs(8))
    assert kept.tolist() == [0, 1, 2] and long.inputs["x"].shape == (3, 8, 1)
    assert not long.inputs["x"][:, 6:].any() and not long.inputs["padding_mask"][:, 6:].any()
    unmasked = replace(data, inputs={"x": x})
    assert parity.fit_lengths(unmasked, specs(5)[:1])[1].size == 0, "no mask: padding is data"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("[5, 12]", "[]"), "tiny.yaml:8: buckets.length is []; expected a length of at least 1"),
        (("[5, 12]", "[12, 5]"), "tiny.yaml:8: buckets.length is [12, 5]: 5 follows 12; expected"),
        (("[5, 12]", "[5, 5, 12]"), "tiny.yaml:8: buckets.length is [5, 5, 12]: 5 is there twice"),
        (("[5, 12]", "[0, 12]"), "tiny.yaml:8: buckets.length.0 is 0; expected at least 1"),
        (("[5, 12]", "[5.5]"), "tiny.yaml:8: buckets.length.0 is 5.5; expected a integer"),
        (("{length: [5, 12]}", "[5, 12]"), "tiny.yaml:8: buckets is [5, 12]; expected a mapping"),
        (("[5, 12]}", "[5], steps: [5]}"), "tiny.yaml:8: buckets has 2 entries; expected at most"),
        (("buckets: {length", "buckets: {size"), "tiny.yaml:8: buckets names the dimension 'size'"),
        (("[5, 12]", "[5, 13]"), "forward refuses the input x batchx13x3"),
        (
            ("batchxlengthx3, padding_mask: batchxlength", "batchx12x3"),
            "tiny.yaml:8: buckets names",
        ),
    ],
)
def test_wrong_buckets_are_told_before_any_long_work(
    changes: tuple[str, str], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, changes)
    with pytest.raises(RecipeError if "forward" not in words else InputError) as raised:
        resolve(load_recipe(path, TARGETS.names()))
    assert words in raised.value.message
    if "forward" in words:
        assert "13 steps; expected at most 12 (max_len)" in raised.value.message


def test_a_causal_model_and_a_bucket_too_short_for_the_data_are_told(tmp_path: Path) -> None:
    path = tmp_path / "jv.yaml"
    text = """schema: flowexport.recipe/1
model: flowformer-timeseries-japanese-vowels
inputs: {x: batchxlengthx12, padding_mask: batchxlength}
buckets: {length: [16, 20]}
evaluation: {dataset: japanese-vowels-test}
"""
    path.write_text(text)
    with pytest.raises(
        RecipeError, match="longer than the longest bucket; expected one of 29"
    ) as raised:
        resolve(load_recipe(path, TARGETS.names()))
    assert raised.value.fix == "buckets: {length: [16, 20, 29]}"
    causal = text.replace("flowformer-", "flowformer-causal-").replace("-test", "-stream-test")
    path.write_text(causal.replace(", padding_mask: batchxlength", ""))
    with pytest.raises(RecipeError, match=r"jv\.yaml:4: .* is causal") as raised:
        resolve(load_recipe(path, TARGETS.names()))
    assert "streaming: {lengths: [16, 20]}" in str(raised.value.fix)


def test_a_target_of_one_function_is_left_out_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ("targets:\n  onnx: {}\n", ""))
    plan = make_plan(path, out=tmp_path / "out")
    assert "tensorrt" not in plan.options
    assert json.dumps(plan.to_json())
    assert plan.to_json()["buckets"] == [5, 12]
    if "tensorrt" in plan.not_run and "lengths" in str(plan.not_run["tensorrt"].reason):
        with pytest.raises(InputError, match="target tensorrt cannot hold several lengths"):
            make_plan(path, targets=["tensorrt"], out=tmp_path / "out")


def test_the_page_shows_each_length_and_what_padding_changes() -> None:
    counts = {"samples": 245, "correct": 241, "agreement": 245}
    bucket = {"function": "forward_16", "length": 16, **counts}
    bucket |= {"longest_correct": 242, "longest_agreement": 244}
    times = {"lengths": {"forward_16": [3.0, 1.0, 2.0]}}
    targets = [
        {"name": "onnx", "parity": {"buckets": [bucket]}, "latency": times},
        {"name": "tflite", "parity": {"buckets": [bucket]}, "latency": {}},
        {"name": "coreml", "parity": {}, "latency": {}},
    ]
    entry = {"dimension": "length", "lengths": [16, 29]}
    rows = [{"name": "onnx", **bucket, "ms": 2.0}, {"name": "tflite", **bucket, "ms": None}]
    assert lengths(targets, {"buckets": entry}) == {**entry, "rows": rows}
    assert lengths(targets, {"buckets": None}) is None
