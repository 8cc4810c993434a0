"""The table of forms: what each target gets, and how rows are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flowexport import measure_forms
from flowexport.baseline.programs import lowered
from flowexport.core.errors import ConversionError
from flowexport.core.types import Options
from flowexport.ops.descriptor import AttentionSite
from flowexport.ops.flow_attention import VARIANTS, op_arguments, table
from flowexport.ops.flow_attention.lowered import FORMS, applicable
from flowexport.ops.segments import loops
from flowexport.registry import TARGETS
from flowexport.resolve import find_recipe, resolve


def site(tokens: int | str, heads: int, width: int, variant: str) -> AttentionSite:
    shape = ("batch", tokens, heads, width)
    return AttentionSite(
        "FlowAttention", "attn", shape, shape, shape, op_arguments(VARIANTS[variant])
    )


@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml", "tensorrt", "other"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 49, 3136, "tokens"])
def test_every_choice_applies_and_says_why(
    target: str, precision: str, variant: str, tokens: int | str
) -> None:
    choice = table.choose(target, precision, site(tokens, 8, 16, variant))
    assert choice.form in applicable(VARIANTS[variant]) and choice.reason


def test_half_arithmetic_takes_the_safe_form() -> None:
    assert table.choose("onnx", "fp16", site(3136, 12, 8, "vision")).form == "means"
    assert table.choose("tflite", "fp16", site(3136, 12, 8, "vision")).form != "means"


@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic", "int8-static"])
def test_what_stores_weights_in_less_keeps_the_layers(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {"channel_first_absorbed": 2.0, "channel_first_projected": 1.9, "token_major": 1.5}
    row = {"target": "tflite", "causal": False, "tokens": 64, "channels": 16, "forms": forms}
    monkeypatch.setattr(table, "rows", lambda: (row,))
    where = site(64, 2, 8, "vision")
    assert table.choose("tflite", "fp32", where).form == "channel_first_absorbed"
    assert table.choose("tflite", precision, where).form == "token_major"


def test_rows_are_of_known_forms_and_never_slower() -> None:
    assert table.rows(), "the table is empty: run python -m flowexport.measure_forms --write"
    for row in table.rows():
        assert set(row["forms"]) <= set(FORMS)
        choice = table.choose(
            row["target"],
            "fp32",
            site(row["tokens"], 1, row["channels"], "causal" if row["causal"] else "vision"),
        )
        assert row["forms"].get(choice.form, 1.0) >= 1.0
        others = [r for f, r in row["forms"].items() if f != table.SEGMENTED]
        assert row["forms"].get(choice.form, 1.0) == max(1.0, *others)  # the batch is dynamic


@pytest.mark.parametrize(
    ("segmented", "batch", "form"),
    [
        (1.91, 1, "causal_scan"),
        (1.89, 1, "causal_chunked"),
        (2.1, 1, "causal_scan"),
        (2.1, "batch", "causal_chunked"),
    ],
)
def test_the_form_of_least_memory_is_taken_where_nearly_as_fast(
    segmented: float, batch: int | str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {"causal_chunked": 2.0, "causal_scan": segmented}
    row = {"target": "onnx", "causal": True, "tokens": 64, "channels": 16, "forms": forms}
    monkeypatch.setattr(table, "rows", lambda: (row,))
    shape = (batch, 64, 2, 8)
    where = AttentionSite("FlowAttention", "", *[shape] * 3, op_arguments(VARIANTS["causal"]))
    choice = table.choose("onnx", "fp32", where)
    assert choice.form == form and choice.reason.startswith(f"{forms[form]:.2f}x the published")
    with loops(False), loops():  # for a target whose loops are not used: many copies
        assert table.choose("onnx", "fp32", where).form == "causal_chunked"


def test_written_rows_replace_those_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE", tmp_path / "table.json")
    (tmp_path / "table.json").write_text('{"rows": []}')
    table.rows.cache_clear()
    try:
        stage = {"tokens": 64, "heads": 2, "width": 8, "variant": "vision"}

        def forms(ratio: float) -> dict[str, object]:
            return {
                "published": {"ratio": {"ci_low": 1.0}},
                "token_major": {"ratio": {"ci_low": ratio}},
            }

        table.write_rows("onnx", [{**stage, "forms": forms(1.5)}])
        choice = table.choose("onnx", "fp32", site(60, 2, 8, "vision"))
        assert choice.form == "token_major" and "1.50x" in choice.reason
        table.write_rows("onnx", [{**stage, "forms": forms(0.9)}])
        assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 1
        assert table.choose("onnx", "fp32", site(60, 2, 8, "vision")).form == "published"
    finally:
        table.rows.cache_clear()


@pytest.mark.parametrize("recipe", ["digits", "japanese-vowels", "japanese-vowels-streaming"])
@pytest.mark.parametrize("target", measure_forms.TARGETS)
def test_attentions_of_shipped_models_are_near_a_measured_row(recipe: str, target: str) -> None:
    program = lowered(resolve(find_recipe(recipe)), attention=True)
    assert program.attentions
    for where in program.attentions:
        _, tokens, heads, width = where.k_shape
        causal = table.variant_of(where.arguments).causal
        row = table.nearest(target, causal, int(tokens), heads * width)
        assert row is not None
        assert 0.25 <= tokens / row["tokens"] <= 4 and 0.5 <= heads * width / row["channels"] <= 2


def test_a_refused_form_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = TARGETS.get("onnx")
    convert = type(target).convert
    published: list[Any] = []

    def refuse(self: Any, program: Any, options: Options, out: Path) -> Any:
        if options.extra["form"] != "published":
            raise ConversionError("convert onnx layer: not this one.")
        if not published:
            published.append(convert(self, program, options, tmp_path))
        return published[0]

    monkeypatch.setattr(type(target), "convert", refuse)
    arguments = ["--target", "onnx", "--stage", "6", "--seconds", "0.01"]
    assert measure_forms.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"published +[0-9.]+ ms +1.00x", printed)
    assert re.search(r"token_major +refused: convert onnx layer: not this one", printed)
    assert measure_forms.main([*arguments, "--form", "token_major"]) == 3
    assert "not this one" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "8"])
def test_a_stage_that_is_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_forms.main(["--stage", number]) == 2
    assert f"--stage is {number}; expected 1 to 7" in capsys.readouterr().err


def test_the_choices_print_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_forms.main(["--chosen", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    sizes = len(measure_forms.STAGES) + len(measure_forms.CAUSAL)
    targets = {r["target"] for r in rows}
    assert targets >= {"onnx", "tflite", "coreml", "tensorrt"}
    assert len(rows) == len(targets) * sizes * 2 and all(r["reason"] for r in rows)
    assert measure_forms.main(["--chosen"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
