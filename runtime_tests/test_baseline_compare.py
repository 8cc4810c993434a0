"""``flowexport bench --baseline``: three exports of a model, outputs compared before any ratio."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mobile_models import layer
from torch import nn
from way_tools import refused, write_model

from flowexport.baseline import compare, compare_sessions
from flowexport.baseline.programs import (
    absorbed_passes,
    absorbed_products,
    features_and_products,
    lowered,
    projections_only,
    published_program,
)
from flowexport.baseline.stock import export_stock
from flowexport.cli import run
from flowexport.core.errors import InputError, VerificationError
from flowexport.core.types import Artifact, Options, Session
from flowexport.lowering.replaced import Replaced
from flowexport.ops.flow_attention import VARIANTS, op_arguments
from flowexport.ops.flow_attention.reference import feature_map
from flowexport.ops.installed import installed_ops
from flowexport.registry import TARGETS
from flowexport.resolve import Subject, find_recipe, resolve

KINDS = ("baseline", "ours", "limit")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return resolve(find_recipe(write_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def artifacts(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The three ONNX files of the tiny model, and ours with one weight changed."""
    folder = tmp_path_factory.mktemp("artifacts")
    published_program(subject, folder / "published.pt2")
    corrupted = copy.deepcopy(subject.module)
    with torch.no_grad():
        next(corrupted.parameters())[0, 0] += 0.5
    programs = {
        "ours": lowered(subject, attention=True),
        "limit": lowered(subject, attention=False),
        "corrupted": lowered(Subject(**{**vars(subject), "module": corrupted}), attention=True),
    }
    inputs = [s.static() for s in programs["ours"].inputs]
    outputs = [s.static() for s in programs["ours"].outputs]
    found = {
        "baseline": export_stock(
            "onnx", folder / "published.pt2", "tiny", inputs, outputs, folder / "stock.onnx"
        )
    }
    for name, program in programs.items():
        (folder / name).mkdir()
        found[name] = TARGETS.get("onnx").convert(program, Options(), folder / name)
    return found


def loaded(artifacts: dict[str, Artifact], ours: str = "ours") -> dict[str, Session]:
    names = dict(zip(KINDS, ("baseline", ours, "limit"), strict=True))
    return {kind: TARGETS.get("onnx").load(artifacts[name]) for kind, name in names.items()}


def feeds(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 6, 8)).astype(np.float32)}


def test_equal_outputs_give_a_ratio(artifacts: dict[str, Artifact]) -> None:
    found = compare_sessions(
        loaded(artifacts), [feeds(1), feeds(2)], feeds(), max_rel=1e-5, rounds=5, min_seconds=0
    )
    assert 0 <= found.max_abs < 1e-5 and found.cases == 2 and found.clock == "thread_cpu"
    assert found.ratio.rounds == 5 == len(found.latency["baseline"].samples_ms)
    assert found.ratio.ci_low <= found.ratio.median <= found.ratio.ci_high
    assert found.ratio.median == pytest.approx(found.p50("baseline") / found.p50("ours"))
    assert found.limit.median == pytest.approx(found.p50("baseline") / found.p50("limit"))
    assert set(found.latency["ours"].together_with) == {"baseline", "limit"}


def test_other_weights_are_refused_before_anything_is_measured(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowexport.baseline.sessions.measure", pytest.fail)
    with pytest.raises(VerificationError, match="no ratio is given") as caught:
        compare_sessions(loaded(artifacts, "corrupted"), [feeds()], feeds(), max_rel=1e-5)
    assert caught.value.exit_code == 4


def test_an_output_that_is_not_finite_is_refused(artifacts: dict[str, Artifact]) -> None:
    sessions = loaded(artifacts)

    class Broken(Session):
        info = sessions["ours"].info

        def _run(self, given: Any) -> Any:
            return {"scores": np.full((1, 3), np.nan, np.float32)}

    sessions["ours"] = Broken(artifacts["ours"])
    with pytest.raises(VerificationError, match="not finite; expected none; no ratio"):
        compare_sessions(sessions, [feeds()], feeds(), max_rel=1.0)


def test_the_limit_keeps_every_weight_and_no_attention(artifacts: dict[str, Artifact]) -> None:
    import onnx

    def operators_of(name: str) -> dict[str, int]:
        found: dict[str, int] = TARGETS.get("onnx").inspect(artifacts[name].path)[
            "operators_inlined"
        ]
        return found

    weights = [t for t in onnx.load(artifacts["limit"].path).graph.initializer if len(t.dims) == 2]
    assert sorted(int(np.prod(t.dims)) for t in weights) == [8 * 3, 8 * 24]
    operators = operators_of("limit")
    assert not {"Sigmoid", "Softmax", "Exp", "Einsum"} & set(operators)
    assert {"Sigmoid", "Softmax"} <= set(operators_of("baseline"))
    assert operators.get("MatMul", 0) + operators.get("Gemm", 0) == 2


@pytest.mark.parametrize(
    ("length", "sources", "width"), [(5, 5, 4), (5, 5, 3), (7, 5, 4), (1, 6, 2)]
)
def test_projections_only_uses_all_three(length: int, sources: int, width: int) -> None:
    q = torch.randn(2, length, 3, 4, requires_grad=True)
    k = torch.randn(2, sources, 3, 4, requires_grad=True)
    v = torch.randn(2, sources, 3, width, requires_grad=True)
    result = projections_only(q, k, v)
    assert result.shape == (2, length, 3, width)
    result.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", ["vision", "timeseries", "causal", "lra"])
def test_the_published_program_is_the_model_in_plain_operators(variant: str) -> None:
    module = layer(variant)
    functions = {op.overload: op.forms["published"] for op in installed_ops()}
    example = (torch.randn(1, 12, 16), torch.ones(1, 12))
    exported = torch.export.export(Replaced(module, functions), example)
    assert "flowexport" not in str(exported.graph)
    with torch.no_grad():
        for got, wanted in zip(exported.module()(*example), module(*example), strict=True):
            torch.testing.assert_close(got, wanted)


def test_replaced_leaves_other_calls_alone() -> None:
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    assert torch.equal(Replaced(module, {})(x), module(x))


@pytest.mark.slow  # three conversions in children, three memory runs
def test_the_command_prints_one_document(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(write_model(tmp_path)), "--baseline", "published"]
    assert run([*arguments, "--rounds", "5", "--min-seconds", "0", "--json"]) == 0
    document = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    entry = document["targets"]["onnx"]
    assert {"median", "ci_low", "ci_high"} <= set(entry["ratio"])
    assert entry["limit_ratio"] > 0 and entry["baseline_ms_p50"] > 0
    assert entry["latency_ms_p50"] > 0 and 0 <= entry["max_abs"] < 1e-5
    assert set(entry["operators"]) == set(KINDS)
    assert entry["operators"]["ours"]["by_name"]["MatMul"] > 0
    assert entry["peak_memory"]["ours_extra_bytes"] > 0 and entry["compared_cases"] >= 5


@pytest.mark.slow  # three conversions in children
def test_the_command_refuses_corrupted_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def corrupted(subject: Subject, *, attention: bool) -> Any:
        module = copy.deepcopy(subject.module)
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        return lowered(Subject(**{**vars(subject), "module": module}), attention=attention)

    monkeypatch.setattr(compare, "lowered", corrupted)
    arguments = ["bench", str(write_model(tmp_path)), "--baseline", "published", "--json"]
    assert run(arguments) == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert set(document) == {"error"} and document["error"]["exit_code"] == 4
    assert "no ratio is given" in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits", "--baseline", "publishd"], ["unknown baseline", "did you mean 'published'"]),
        (["digits", "--baseline", "published", "-t", "coreml"], ["no stock exporter", "tflite"]),
        (["digits", "--baseline", "published", "-t", "onx"], ["unknown target", "'onnx'"]),
        (["digitz", "--baseline", "published"], ["recipe or model", "'digits'"]),
        (["digits", "--baseline", "published", "--save"], ["--save", "bundles"]),
        (["digits", "--rounds", "3"], ["--rounds", "without --baseline"]),
    ],
)
def test_bad_input(
    arguments: list[object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, 2, *words, arguments=["bench", *arguments])


def test_a_bundle_has_no_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    arguments: list[object] = ["bench", tmp_path, "--baseline", "published"]
    refused(capsys, 2, "a bundle holds no module", "recipe", arguments=arguments)


def test_a_recipe_of_other_targets_says_which_there_are(tmp_path: Path) -> None:
    text = (write_model(tmp_path)).read_text().replace("onnx: {}", "coreml: {}")
    text = text[: text.index("fusions")]
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(InputError, match="none of the recipe's targets has a stock exporter"):
        compare.compare_recipe(tmp_path / "other.yaml")


@pytest.mark.parametrize("name", ["vision", "lra"])
def test_the_bounds_compute_what_they_say(name: str) -> None:
    variant = VARIANTS[name]
    q, k, v = (torch.randn(2, n, 3, w, dtype=torch.float64) for n, w in ((5, 4), (7, 4), (7, 6)))
    fq, fk = feature_map(q, variant), feature_map(k, variant)
    wanted = torch.einsum("blhd,bshd,bshm->blhm", fq, fk, v)
    arguments = op_arguments(variant)
    torch.testing.assert_close(features_and_products(q, k, v, *arguments), wanted)
    x, wv, wo, bias = (
        torch.randn(*s, dtype=torch.float64) for s in ((2, 7, 5), (18, 5), (6, 18), (6,))
    )
    v = (x @ wv.T).unflatten(2, (3, 6))
    wanted = torch.einsum("blhd,bshd,bshm->blhm", fq, fk, v).flatten(2) @ wo.T + bias
    torch.testing.assert_close(absorbed_products(q, k, x, wv, wo, bias, *arguments), wanted)
    incoming = torch.einsum("blhd,bhd->blh", fq, fk.sum(1))[..., None]
    outgoing = torch.einsum("bshd,bhd->bsh", fk, fq.sum(1))[..., None]
    allocated = fq * torch.einsum("blhd,bhd->blh", fq, (fk * outgoing).sum(1))[..., None]
    weighted = fk * torch.einsum("bshd,bhd->bsh", fk, (fq * incoming).sum(1))[..., None]
    flows = torch.einsum("blhd,bshd,bshm->blhm", allocated, weighted, v).flatten(2) @ wo.T + bias
    torch.testing.assert_close(absorbed_passes(q, k, x, wv, wo, bias, *arguments), flows)
