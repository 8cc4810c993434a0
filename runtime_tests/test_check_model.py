"""``flowexport check`` and the range check of fp16 conversions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming_tools import write_recipe
from torch import nn
from way_tools import refused

import flowexport
from flowexport import rangecheck
from flowexport.cli import run
from flowexport.core.errors import ConversionError, InputError, UnknownNameError
from flowexport.core.types import TensorSpec
from flowexport.logits import Calls, calibrate, calibrate_subject, calibration_samples
from flowexport.lowering import lower
from flowexport.ops.descriptor import Choice
from flowexport.ops.flow_attention import VARIANTS, flow_attention, lowered
from flowexport.rangecheck import arithmetics, check_document, check_target
from flowexport.registry import TARGETS
from flowexport.report import validate
from flowexport.resolve import find_recipe, resolve

FILE = """
import torch
from torch import nn
from flowexport.ops.flow_attention import VARIANTS, flow_attention

class Attend(nn.Module):
    def __init__(self, variant, heads):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.heads, self.variant = nn.Linear(8, 192 * heads), heads, VARIANTS[variant]

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.heads, 64)) for p in self.qkv(x).chunk(3, -1))
        return flow_attention(q, k, v, self.variant).flatten(2).mean(1)

class Model(nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self.attend = Attend(*arguments)

    def forward(self, x):
        return self.attend(x)

def plain():
    return Model("vision", 1)

def causal():
    return Model("causal", 1)
"""

PINNED = """schema: flowexport.recipe/1
name: pinned
model: attend.py:causal
weights: {random: 0}
inputs: {x: 1x1024x8}
targets:
  coreml: {form: causal_chunked}
tolerances:
  fp16: {max_rel: 1.0e-2, reason: never reached}
"""


class Two(nn.Module):
    """Two attentions, the second with logits ten times as wide."""

    def __init__(self, variant: str = "vision") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 24), nn.Linear(8, 24)
        self.variant = VARIANTS[variant]

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p.unflatten(-1, (2, 4)) for p in x.chunk(3, -1))
        return flow_attention(q, k, v, self.variant).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(10 * self.second(self.attend(self.first(x))))


def calls_of(module: nn.Module, tokens: int, width: int, samples: int = 2) -> tuple[Calls, ...]:
    spec = TensorSpec("x", (1, tokens, width))
    program = lower(module, [spec], ["y"], name="m", ops=[lowered.DESCRIPTOR])
    return calibrate(program, calibration_samples([spec], None, count=samples)[0])


@pytest.fixture(scope="module")
def long_calls() -> tuple[Calls, ...]:
    names: dict[str, Any] = {}
    exec(FILE, names)  # the same model as the command line's
    return calls_of(names["plain"](), 16384, 8, samples=1)


@pytest.fixture(scope="module")
def causal_calls() -> tuple[Calls, ...]:
    names: dict[str, Any] = {}
    exec(FILE, names)
    return calls_of(names["causal"](), 1024, 8, samples=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "attend.py"
    path.write_text(FILE)
    return path


def test_calibration_sees_what_reaches_each_attention() -> None:
    module = Two()
    feeds, told = calibration_samples([TensorSpec("x", (1, 6, 4))], None)
    assert len(feeds) == 2 and "random" in told
    first, second = calls_of(module, 6, 4)
    with torch.no_grad():
        for sample, (q, k, v) in zip(feeds, first.samples, strict=True):
            wanted = module.first(torch.from_numpy(sample["x"]))
            torch.testing.assert_close(torch.cat([x.flatten(2) for x in (q, k, v)], -1), wanted)
    largest = max(sample[0].max().item() for sample in first.samples)
    assert first.ranges["q"].high == pytest.approx(largest)
    assert second.ranges["k"].std > first.ranges["k"].std


def test_published_form_at_16384_tokens_is_unsafe_and_means_is_taken(
    long_calls: tuple[Calls, ...],
) -> None:
    for target in ("onnx", "coreml", "tensorrt"):
        found = check_target(target, "fp16", long_calls)
        (layer,) = found.layers
        assert layer.form == "means" and layer.site.module_path == "attend"
        for arithmetic in ("fp16", "fp16_ftz"):
            lost = layer.published[arithmetic]
            assert not lost.safe and (lost.lost > 0.9 or lost.error == float("inf"))
            assert layer.chosen[arithmetic].safe
            assert layer.chosen[arithmetic].error <= 3e-3
        assert found.safe and not found.published_safe and found.taken is None
        assert "takes means" in found.action and "N = 16384" in found.action
        found.require_safe("m")


def test_a_pinned_form_that_is_unsafe_refuses_the_conversion(long_calls: tuple[Calls, ...]) -> None:
    found = check_target("onnx", "fp16", long_calls, pinned="published")
    assert not found.safe and found.taken is None and "pinned" in found.action
    with pytest.raises(ConversionError, match="convert onnx m: 1 of 1 attentions") as caught:
        found.require_safe("m")
    assert caught.value.exit_code == 3 and "--no-check" in str(caught.value.fix)


def test_a_safe_form_replaces_an_unsafe_choice(
    long_calls: tuple[Calls, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(lowered.DESCRIPTOR, choose=lambda *_: Choice("published", "a wrong table"))
    monkeypatch.setattr(lowered, "DESCRIPTOR", wrong)
    found = check_target("onnx", "fp16", long_calls)
    assert found.layers[0].form == "published" and not found.layers[0].chosen["fp16"].safe
    assert found.safe and found.taken == "means" and "takes means instead" in found.action
    assert found.layers[0].replacement is not None and found.layers[0].replacement["fp16"].safe
    assert found.taken_because == ("range check: the table's form is not safe in fp16, this one is")
    validate(check_document("m", {"onnx": found}), "check")


def test_weights_stored_in_half_are_computed_in_float32(long_calls: tuple[Calls, ...]) -> None:
    found = check_target("tflite", "fp16", long_calls)
    assert found.decisive == ("fp32",) and set(found.layers[0].chosen) == {"fp32"}
    assert found.safe and found.layers[0].form != "means"
    assert check_target("onnx", "fp32", long_calls).safe


def test_subnormals_decide_where_the_device_may_flush_them(
    causal_calls: tuple[Calls, ...],
) -> None:
    kept, flushed = (check_target(t, "fp16", causal_calls) for t in ("onnx", "coreml"))
    for found in (kept, flushed):
        (layer,) = found.layers
        assert found.safe and found.taken is None and layer.form == "causal_means"
        assert layer.published["fp16"].safe and layer.published["fp16_ftz"].lost > 0.05
        assert all(verdict.safe for verdict in layer.chosen.values())
    assert kept.published_safe and not flushed.published_safe
    pinned = check_target("coreml", "fp16", causal_calls, pinned="causal_chunked")
    assert not pinned.safe and pinned.layers[0].chosen["fp16_ftz"].lost > 0.05
    assert arithmetics("onnx", "fp16") == ("fp16",)
    assert arithmetics("another", "fp16") == ("fp16", "fp16_ftz")


def test_bfloat16_has_the_range(long_calls: tuple[Calls, ...]) -> None:
    layer = check_target("tensorrt", "bf16", long_calls).layers[0]
    assert set(layer.published) == {"bf16"} and layer.published["bf16"].overflow == ""


def test_sums_in_half_decide_where_they_are_asked_for(long_calls: tuple[Calls, ...]) -> None:
    """Two stages keep a mean of 16,384 halves; the published sums fail in any half."""
    plain = check_target("tensorrt", "fp16", long_calls)
    strict = check_target("tensorrt", "fp16", long_calls, require=["fp16_acc16"])
    assert plain.decisive == ("fp16",) and strict.decisive == ("fp16", "fp16_acc16")
    for found in (plain, strict):
        assert found.safe and found.layers[0].chosen["fp16_acc16"].safe
        assert not found.layers[0].published["fp16_acc16"].safe
    assert check_target("tflite", "fp16", long_calls, require=["fp16_acc16"]).decisive == ("fp32",)
    with pytest.raises(UnknownNameError, match="arithmetic 'bf16'"):
        check_target("onnx", "fp16", long_calls, require=["bf16"])


def test_every_length_of_a_causal_model_is_checked(tmp_path: Path) -> None:
    calls, told = calibrate_subject(resolve(find_recipe(write_recipe(tmp_path))))
    assert [(c.function, c.site.q_shape[1]) for c in calls] == [("forward", 8), ("forward_70", 70)]
    assert all(s.shape[1] == 70 for s in calls[1].samples[0]) and "random" in told
    found = check_target("coreml", "fp16", calls)
    assert [layer.name for layer in found.layers] == [
        "layers.0.attention",
        "layers.0.attention (forward_70)",
    ]
    assert found.safe and {layer.form for layer in found.layers} == {"causal_means"}


def test_artifact_manifest_and_report_tell_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that the check put in place says so, and is not called the recipe's."""
    subject = "flowexport.ops.flow_attention.lowered.DESCRIPTOR"
    wrong = replace(lowered.DESCRIPTOR, choose=lambda *_: Choice("published", "a wrong table"))
    monkeypatch.setattr(subject, wrong)
    path = tmp_path / "attend.py"
    path.write_text(FILE)
    result = flowexport.convert(
        f"{path}:plain",
        inputs=[TensorSpec("x", (1, 4096, 8))],
        targets=["onnx"],
        precision="fp16",
        out=tmp_path / "bundle",
        verify=False,
        bench=False,
    )
    entry = result.manifest["targets"]["onnx"]
    check = entry["range_check"]
    validate({**check_document("m", {}), "targets": {"onnx": check}}, "check")
    assert check["taken"] == "means" and check["layers"][0]["form"] == "published"
    assert entry["form"] == "means"
    (site,) = entry["details"]["attentions"]
    assert site["reason"].startswith("range check: the table's form is not safe in fp16")
    page = (result.bundle / "report.html").read_text()
    assert "Range check before the conversion" in page and "takes means instead" in page
    assert "pinned by the recipe" not in page


def test_heads_are_left_out_only_where_they_do_not_see_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rangecheck, "MOST_VALUES", 1)
    causal = calls_of(Two("causal"), 6, 4)[0]
    q, k, v = causal.samples[0]
    one = rangecheck._fewer_heads(causal.site, q, k, v)
    assert [x.shape[2] for x in one] == [1, 1, 1]
    widths = q.abs().amax(dim=(0, 1, 3)) + k.abs().amax(dim=(0, 1, 3))
    assert torch.equal(one[0][:, :, 0], q[:, :, int(widths.argmax())])
    plain = calls_of(Two(), 6, 4)[0]
    q, k, v = plain.samples[0]
    assert rangecheck._fewer_heads(plain.site, q, k, v)[0] is q


def test_given_samples_are_used() -> None:
    spec = TensorSpec("x", ("batch", 3, 2))
    given = {"x": np.arange(24, dtype=np.float32).reshape(4, 3, 2)}
    feeds, told = calibration_samples([spec], None, given)
    assert told == "2 samples of given" and feeds[1]["x"].shape == (1, 3, 2)
    assert np.array_equal(feeds[0]["x"], given["x"][:1])
    with pytest.raises(InputError, match="input x is missing"):
        calibration_samples([spec], None, {"y": given["x"]})
    with pytest.raises(InputError, match="expected at least one"):
        calibration_samples([spec], None, {})
    with pytest.raises(UnknownNameError, match="precision"):
        check_target("onnx", "int8", ())


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "digits", "--target", "onnx", "--target", "tflite", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=pytest.fail)
    assert captured.err == ""
    validate(document, "check")
    assert document["safe"] is True and document["schema"] == "flowexport.check/1"
    assert document["targets"]["onnx"]["samples"] == "2 samples of digits-test"
    assert set(document["targets"]) == {"onnx", "tflite"}
    layers = document["targets"]["onnx"]["layers"]
    assert [layer["module"] for layer in layers] == [
        "blocks.0.0.attn",
        "blocks.1.0.attn",
        "blocks.1.1.attn",
        "blocks.2.0.attn",
    ]
    for layer in layers:
        told = {"fp16", "fp16_ftz", "fp16_acc16"}
        assert set(layer["published"]) == set(layer["chosen"]) == told
        assert layer["function"] == "forward" and layer["replacement"] is None
        assert layer["ranges"]["q"]["low"] < layer["ranges"]["q"]["high"]
        assert 0 < layer["chosen"]["fp16"]["error"] < 8e-3


@pytest.fixture
def pinned(file: Path) -> Path:
    path = file.with_name("pinned.yaml")
    path.write_text(PINNED)
    return path


def test_exit_code_3_and_the_table(pinned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(pinned), "--target", "coreml"]) == 3
    out = capsys.readouterr().out
    assert "NOT SAFE" in out and "random samples" in out and "fp16_ftz" in out
    free = ["check", f"{pinned.with_name('attend.py')}:causal", "--input", "x:1x1024x8"]
    assert run([*free, "--target", "coreml"]) == 0
    assert "takes causal_means" in capsys.readouterr().out


def test_convert_refuses_before_it_writes(
    pinned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not TARGETS.get("coreml").probe().converts:
        pytest.skip("coremltools is not installed: the plan stops at the target")
    out = tmp_path / "out"
    arguments: list[object] = ["convert", pinned, "--precision", "fp16", "--out", out]
    refused(capsys, 3, "fp16_ftz", "attend", "--no-check", arguments=arguments)
    assert not out.exists()
    assert run([str(a) for a in (*arguments, "--no-check", "--dry-run", "--json")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["targets"]["coreml"]["range_check"] is None


def test_the_plan_tells_the_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["convert", "digits", "--target", "onnx", "--precision", "fp16"]
    assert run([*arguments, "--out", str(tmp_path / "o"), "--dry-run", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["targets"]["onnx"]
    assert entry["range_check"].startswith("takes means")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits", "--precision", "int8"], ["precision", "int8", "bf16"]),
        (["digits", "--target", "onx"], ["target", "did you mean 'onnx'"]),
        (["digit"], ["recipe or model", "digits"]),
        (["digits", "--samples", "no.npz"], ["no.npz", "expected a .npz"]),
        (["digits", "--input", "image"], ["NAME:SHAPE"]),
    ],
)
def test_bad_input(
    arguments: list[object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, 2, *words, arguments=["check", *arguments])


def test_samples_of_the_wrong_shape_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, image=np.zeros((2, 1, 8, 8), np.float32))
    refused(capsys, 2, "image has shape", arguments=["check", "digits", "--samples", path])
    whole = path.read_bytes()
    for content in (b"not a zip", whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        words = ["cannot be read: it is no archive of arrays, or cut short", "numpy.savez(FILE"]
        refused(capsys, 2, *words, arguments=["check", "digits", "--samples", path])
