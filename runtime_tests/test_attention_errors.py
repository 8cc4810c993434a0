"""The table of worst errors: every form and variant, and what half loses."""

from __future__ import annotations

import json

import pytest

from flowexport.ops.flow_attention import form_errors
from flowexport.ops.flow_attention.form_errors import main, worst


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_errors, "SHAPES", form_errors.SHAPES[:5])


def test_rows_of_every_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--form", "causal_means"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["variant"], r["dtype"]) for r in rows} == {
        (v, d) for v in ("causal", "nlp", "rl") for d in ("fp64", "fp32", "half")
    }
    bounds = {"fp64": 1e-12, "fp32": 5e-6, "half": 3e-3}
    assert all(0 < r["error"] <= bounds[r["dtype"]] and r["lost"] == 0 for r in rows)


def test_table_has_a_line_a_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--form", "means"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["variant", "form", "fp64", "fp32", "half", "lost"]
    variants = [line.split()[0] for line in lines]
    assert variants == ["standard", "vision", "timeseries", "lra", "mobile"]


def test_a_form_that_loses_half_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: saturated features and many tokens."""
    monkeypatch.setattr(form_errors, "SHAPES", ((1, 4096, 4096, 1, 64, 4),))
    published, means = (worst("vision", form, "half") for form in ("published", "means"))
    assert published.lost > 0.9 and published.error > 0.5
    assert "4096" in published.where and means.lost == 0 and means.error <= 3e-3
