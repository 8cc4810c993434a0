"""``python -m flowexport.measure_goals`` on tiny rows: what it compares, measures and refuses."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowexport import measure_goals
from flowexport.baseline.programs import absorbed_passes, causal_passes, causal_products
from flowexport.core.errors import VerificationError
from flowexport.core.types import TensorSpec
from flowexport.goal_sides import absorbed_bound, products_bound
from flowexport.measure_forms import layer, quiet_libraries
from flowexport.measure_goals import ROWS, Row, measure_row
from flowexport.ops.flow_attention import VARIANTS, causal, op_arguments

TINY = {
    "layer": Row("layer", "onnx", 12, 2, 4, wanted=1e-9, rounds=3),
    "causal": Row("causal", "onnx", 70, 2, 4, wanted=1e9, less_memory=1e-9, rounds=3),
    "step": Row("step", "onnx", 40, 2, 4, wanted=1e-9, rounds=3),
    "softmax": Row("softmax", "onnx", 12, 2, 8, wanted=1e-9, rounds=3),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["softmax", "step", *(pytest.param(k, marks=SLOW) for k in ("layer", "causal"))]
)
def test_a_row_compares_then_measures(kind: str) -> None:
    row = TINY[kind]
    found = json.loads(json.dumps(measure_row(row)))
    assert found["name"] == row.name and found["ratio"]["rounds"] == 3
    assert found["ratio"]["ci_low"] <= found["ratio"]["median"] <= found["ratio"]["ci_high"]
    assert 0 < found["max_rel"] < 1e-5, "two different programs ran"
    assert found["reached"] is (kind != "causal")
    assert (found["limit"] is not None) is (kind == "layer")
    assert set(found["ms"]) >= {"baseline", "ours"} and min(found["ms"].values()) > 0
    if kind == "step":
        own = found["own_forward_over_step"]
        assert own["median"] == pytest.approx(found["ms"]["own_forward"] / found["ms"]["ours"])
        assert found["ratio"]["median"] != own["median"], "the stock export is another baseline"
    if kind == "layer":
        assert found["products_limit"]["median"] > 0
        assert set(found["operators"]) == {"baseline", "ours", "limit", "products"}
        assert found["operators"]["products"]["Sigmoid"] == 2, "features, and no flow"
    if kind == "causal":
        assert min(found[f"{bound}_limit"]["median"] for bound in ("products", "passes")) > 0
        assert set(found["operators"]) == {"baseline", "ours", "products", "passes"}
        for bound in ("products", "passes"):
            counts = found["operators"][bound]
            assert counts["Sigmoid"] == 2 and not {"Div", "Exp", "Clip"} & set(counts)
        assert found["memory"]["run_ratio"] > 0
        assert found["memory"]["ours_run_extra_bytes"] <= found["memory"]["ours_extra_bytes"]
        assert found["memory"]["ours_extra_bytes"] > 0 and found["form"].startswith("causal_")
    text = measure_goals.line(found)
    assert row.name in text and ("not reached" in text) is (kind == "causal")


@pytest.mark.parametrize(("length", "segment"), [(70, 4), (200, 1), (300, 2)])
def test_the_causal_bounds_compute_what_they_say(
    length: int, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "SEGMENT", segment)
    q, k, v = (torch.randn(2, length, 3, d, dtype=torch.float64) for d in (4, 4, 5))
    scores = torch.einsum("blhd,bshd->bhls", q.sigmoid(), k.sigmoid()).tril()
    truth = torch.einsum("bhls,bshm->blhm", scores, v)
    arguments = op_arguments(VARIANTS["causal"])
    found = causal_products(q, k, v, *arguments)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    x, y = (scores.sum(dim=3, keepdim=True), scores_out(q, k).sum(dim=3, keepdim=True))
    sink, source = scores @ y, scores_out(q, k) @ x
    flows = scores @ (v.transpose(1, 2) * source) * sink
    found = causal_passes(q, k, v, *arguments)
    # The values' signs cancel: of the largest output, not of each.
    largest = float(flows.abs().max())
    torch.testing.assert_close(found / largest, flows.transpose(1, 2) / largest, rtol=0, atol=1e-12)


def scores_out(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """φ(k_t) · φ(q_s) for s ≤ t, (B, H, L, L)."""
    return torch.einsum("blhd,bshd->bhls", k.sigmoid(), q.sigmoid()).tril()


@pytest.mark.parametrize("name", ["torch.onnx", "torch.utils._pytree", "torchao"])
def test_other_packages_warnings_are_held_back(
    name: str, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger=name)  # a Core ML conversion here may have raised it
    logger, native = logging.getLogger(f"{name}.child"), os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    with quiet_libraries():
        warnings.warn("theirs", FutureWarning, stacklevel=1)
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="flowexport.core")
    assert [str(w.message) for w in recwarn] == ["ours"]
    assert logger.isEnabledFor(logging.WARNING)
    assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == native


@pytest.mark.slow  # a process of its own: LiteRT's converter reads its level once
def test_measuring_litert_leaves_stderr_empty() -> None:
    arguments = ["--target", "tflite", "--stage", "6", "--form", "published", "--seconds", "0.01"]
    command = [sys.executable, "-m", "flowexport.measure_forms", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert re.search(r"published +[0-9.]+ ms", done.stdout) and done.stderr == ""


def test_the_litert_bounds_hold_features_products_and_passes_alone(tmp_path: Path) -> None:
    row = Row("layer", "tflite", 12, 2, 4, wanted=1.0)
    inputs = [TensorSpec("x", (1, 12, 8))]
    module = layer(12, 2, 4, "vision").eval()
    bound = products_bound(row, module, inputs, tmp_path / "products")
    passes = absorbed_bound(row, module, inputs, absorbed_passes, tmp_path / "passes")
    wanted = {
        "FULLY_CONNECTED": 2,  # q, k
        "LOGISTIC": 2,
        "BATCH_MATMUL": 4,  # kᵀ x and q M of the projections' size, two small ones between
        "ADD": 1,  # the output's bias
    }
    for artifact in (bound, passes):
        assert artifact.details["delegation"]["serving_default"]["partitions"] == 1
        counts = artifact.details["operators"]
        assert counts["TRANSPOSE"] <= 3
        assert {n: c for n, c in counts.items() if n not in ("RESHAPE", "TRANSPOSE")} == wanted
        assert counts["RESHAPE"] == bound.details["operators"]["RESHAPE"]
        # Four dots, two weighted totals, two scalings; four dots' sums, four totals.
        wanted |= {"MUL": 8, "SUM": 8}


@pytest.mark.slow  # three LiteRT conversions
def test_a_litert_row_tells_its_partitions() -> None:
    found = measure_row(Row("layer", "tflite", 12, 2, 4, wanted=1e-9, rounds=3))
    assert found["partitions"] == 1 and found["reached"] is True


@pytest.mark.parametrize("kind", ["step", pytest.param("layer", marks=SLOW)])
def test_a_wrong_result_is_refused_before_anything_is_measured(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    target = measure_goals.TARGETS.get("onnx")
    load = type(target).load

    def wrong(self: Any, artifact: Any, *, threads: int = 1) -> Any:
        session = load(self, artifact, threads=threads)
        if not loaded:  # one side only
            run = session.run
            session.run = lambda feeds: {n: y + np.float32(0.1) for n, y in run(feeds).items()}
        loaded.append(session)
        return session

    monkeypatch.setattr(type(target), "load", wrong)
    monkeypatch.setattr(measure_goals, "measure", pytest.fail)
    with pytest.raises(VerificationError, match="no ratio is given"):
        measure_row(TINY[kind])


def test_a_row_whose_published_form_does_not_fit_says_so() -> None:
    row = Row("causal", "onnx", 1 << 24, 8, 64, wanted=9.0, less_memory=30)
    found = json.loads(json.dumps(measure_row(row)))
    assert found["reached"] is False and "ratio" not in found
    assert "needs about 14336.0 GiB at L = 16777216" in found["not_run"]
    assert "not run: the published form needs" in measure_goals.line(found)


def test_the_command_measures_the_rows_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        measure_goals, "measure_row", lambda row, *, rounds: {"name": row.name, "rounds": rounds}
    )
    arguments = ["--row", "step-onnx-1024", "--row", "layer-tflite-49", "--rounds", "2", "--json"]
    assert measure_goals.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == [
        {"name": "step-onnx-1024", "rounds": 2},
        {"name": "layer-tflite-49", "rounds": 2},
    ]
    assert document["machine"]["cores_logical"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--row", "layer-onx-49"], "layer-onnx-49"), (["--rounds", "1"], "expected 2 or more")],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_goals.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_names_are_unique_and_every_goal_is_there() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    kinds = {(row.kind, row.target) for row in ROWS}
    assert kinds >= {("layer", "tflite"), ("causal", "tflite"), ("step", "onnx")}
