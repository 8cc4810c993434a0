"""report.json, report.html and the terminal's table: complete, escaped, offline, readable."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evidence_fakes import INPUTS, OUTPUTS, TOLERANCE, FakeTarget, evaluation, golden, unavailable
from rich.console import Console

from flowexport.bench import bench_feeds, measure
from flowexport.core.errors import BundleError, UnknownNameError
from flowexport.core.reports import LatencyReport, ParityReport
from flowexport.core.types import Options
from flowexport.parity import verify_artifact
from flowexport.report import SCHEMAS, read_report, summary_table, validate, write_report
from flowexport.report.format import closeness, number, size
from flowexport.report.svg import Axis, error_axis, time_axis

EVIL = "</style><script>alert('x')</script>\"'&<b>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def evidence(
    folder: Path,
) -> tuple[dict[str, Any], dict[str, ParityReport], dict[str, LatencyReport]]:
    """A bundle with one target of each verdict."""
    targets = {
        "good": FakeTarget("good", execution="interpreted"),
        "bad": FakeTarget("bad", damage=lambda r: {**r, "state": r["state"] * float("nan")}),
        "absent": unavailable(),
    }
    entries, parity, sessions = {}, {}, {}
    for name, target in targets.items():
        target.name = name
        artifact = target.convert(None, Options(), folder / name)
        parity[name] = verify_artifact(
            target, artifact, golden(), evaluation(), TOLERANCE, require_fusions={}
        )
        entries[name] = {
            **artifact.to_json(folder),
            "tolerance": TOLERANCE.to_json(),
            "required_fusions": {"FlowAttention": 2},
            "conversion": {"seconds": 1.5, "peak_rss_bytes": 2**28},
            "deterministic": {"deterministic": None, "reason": "not tried"},
        }
        if name != "absent":
            sessions[name] = target.load(artifact)
    entries["good"]["details"] = {
        "operators": {"MatMul": 12, "Add": 3},
        "sites": [
            {"module": f"layers.{i}", "form": "token-major", "reason": "why"} for i in (0, 1)
        ],
        "warnings": ["two partitions"],
    }
    feeds = bench_feeds(INPUTS, golden().cases["zeros"])
    latency = measure(sessions, feeds, warmup=1, min_runs=5, min_seconds=0)
    latency["absent"] = LatencyReport("absent", not_run="no GPU is present")
    manifest = {
        "schema": "flowexport.manifest/1",
        "name": "fakes",
        "flowexport": "0.1.0",
        "description": "A classifier in numpy.",
        "recipe": {"name": "fakes"},
        "recipe_sha256": "1" * 64,
        "model": {"name": "fake-classifier", "parameters": 16, "attentions": 2},
        "inputs": [s.to_json() for s in INPUTS],
        "outputs": [s.to_json() for s in OUTPUTS],
        "labels": list("abcd"),
        "versions": {"python": "3.11"},
        "files": {"good/good.npz": {"size_bytes": 5, "sha256": "2" * 64}},
        "targets": entries,
    }
    validate(manifest, "manifest")
    return manifest, parity, latency


def written(folder: Path) -> tuple[dict[str, Any], str]:
    manifest, parity, latency = evidence(folder)
    write_report(folder, manifest, parity, latency)
    return (
        json.loads((folder / "report.json").read_text()),
        (folder / "report.html").read_text(),
    )


def test_json_follows_its_schema_and_reads_back(tmp_path: Path) -> None:
    document, _ = written(tmp_path)
    validate(document, "report")
    assert document["verdict"] == "FAIL"
    verdicts = {n: t["verdict"] for n, t in document["targets"].items()}
    assert verdicts == {"good": "PASS", "bad": "FAIL", "absent": "NOT_RUN"}
    parity, latency = read_report(tmp_path)
    assert {n: r.to_json() for n, r in parity.items()} == {
        n: t["parity"] for n, t in document["targets"].items()
    }
    assert latency["good"].to_json() == document["targets"]["good"]["latency"]
    assert not list(tmp_path.glob(".*"))


def test_a_target_without_evidence_is_shown_as_not_run(tmp_path: Path) -> None:
    manifest, _, _ = evidence(tmp_path)
    write_report(tmp_path, manifest, {}, {})
    document = json.loads((tmp_path / "report.json").read_text())
    assert {t["verdict"] for t in document["targets"].values()} == {"NOT_RUN"}
    assert document["verdict"] == "NOT_RUN"
    text = Page((tmp_path / "report.html").read_text()).text
    assert text.count("Nobody has verified it yet.") >= 3


@pytest.mark.parametrize(
    "damage",
    [
        {"verdict": "GREEN"},
        {"schema": "flowexport.bundle-report/2"},
        {"surprise": 1},
        {"targets": {"x": {"verdict": "PASS", "parity": None}}},
        {"machine": {"load": float("nan")}},
    ],
)
def test_documents_that_break_the_schema_are_refused(
    damage: dict[str, Any], tmp_path: Path
) -> None:
    document, _ = written(tmp_path)
    with pytest.raises(BundleError, match="validate report"):
        validate({**document, **damage}, "report")


def test_manifests_that_break_the_schema_are_refused(tmp_path: Path) -> None:
    manifest, _, _ = evidence(tmp_path)
    for key in ("schema", "targets", "files", "recipe_sha256"):
        with pytest.raises(BundleError, match=key):
            validate({k: v for k, v in manifest.items() if k != key}, "manifest")
    for key in ("path", "sha256", "size_bytes", "precision", "form", "fusions"):
        entry = {k: v for k, v in manifest["targets"]["good"].items() if k != key}
        with pytest.raises(BundleError, match=key):
            validate({**manifest, "targets": {"good": entry}}, "manifest")


def test_unreadable_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"report\.json"):
        read_report(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(BundleError):
            read_report(tmp_path)
    with pytest.raises(UnknownNameError):
        validate({}, "recipt")


def test_schemas_are_schemas() -> None:
    from jsonschema import Draft202012Validator

    from flowexport.report.schema import load_schema

    for name in SCHEMAS:
        Draft202012Validator.check_schema(load_schema(name))


def test_page_shows_every_verdict_with_its_reason(tmp_path: Path) -> None:
    _, html = written(tmp_path)
    page = Page(html)
    badges = [
        a["class"] or "" for t, a in page.tags if t == "span" and "badge" in str(a.get("class"))
    ]
    for verdict in ("PASS", "FAIL", "NOT_RUN"):
        assert sum(verdict in b.split() for b in badges) >= 2
    for text in (
        "not finite",  # why bad failed
        "no GPU is present",  # why absent did not run
        "add a GPU",  # and what mends it
        "interpreted",
        "36 of 40 right",
        "fp32 rounding of sums",  # the tolerance's reason
        "two partitions",
        "2 × token-major",
        "flowexport verify .",
        "was not measured",
        "2" * 64,
    ):
        assert text in page.text, text


def test_page_is_self_contained_and_runs_nothing(tmp_path: Path) -> None:
    _, html = written(tmp_path)
    page = Page(html)
    assert not {t for t, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert "default-src 'none'" in html
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", html)
    for _, attributes in page.tags:
        assert not [k for k in attributes if k.startswith("on")]
        href = attributes.get("href")
        assert href is None or href.startswith("#")


def test_page_is_accessible_in_what_a_parser_can_see(tmp_path: Path) -> None:
    _, html = written(tmp_path)
    page = Page(html)
    assert ("html", {"lang": "en"}) in page.tags
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "a":
            assert str(attributes["href"])[1:] in ids
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] == "col"
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels.count(1) == 1


def test_plots_stay_on_the_page(tmp_path: Path) -> None:
    _, html = written(tmp_path)
    positions = re.findall(r'(?:cx|x1|x2|x|width)="([^"]*)%"', html)
    assert len(positions) > 100
    assert all(0 <= float(p) <= 100 for p in positions)


def test_strings_of_a_model_cannot_become_markup(tmp_path: Path) -> None:
    manifest, parity, latency = evidence(tmp_path)
    manifest |= {"name": EVIL, "description": EVIL, "labels": [EVIL], "versions": {EVIL: EVIL}}
    manifest["model"]["name"] = EVIL
    manifest["targets"] = {EVIL: manifest["targets"]["good"]}
    manifest["targets"][EVIL] |= {"details": {"operators": {EVIL: 1}, EVIL: EVIL}, "form": EVIL}
    write_report(tmp_path, manifest, {EVIL: parity["bad"]}, {EVIL: latency["good"]})
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert "script" not in {t for t, _ in page.tags} and "b" in {t for t, _ in page.tags}
    assert "<script" not in html and EVIL in page.text
    # one <style>, closed where ours ends
    assert html.count("</style>") == 1


def contrast(one: str, two: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        lin = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme: int) -> None:
    import flowexport.report.html

    css = (flowexport.report.html.TEMPLATES / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [("text", "bg"), ("text", "card"), ("muted", "card"), ("muted", "bg"), ("text", "soft")]
    pairs += [(v, f"{v}-bg") for v in ("pass", "fail", "skip")]
    pairs += [("accent", "card"), ("text", "skip-bg"), ("text", "fail-bg"), ("fail", "card")]
    for front, back in pairs:
        assert contrast(colours[front], colours[back]) >= 4.5, (front, back)


def test_terminal_table_tells_the_same(tmp_path: Path) -> None:
    manifest, parity, latency = evidence(tmp_path)
    sizes = {n: t["size_bytes"] for n, t in manifest["targets"].items()}
    console = Console(width=160, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(summary_table(parity, latency, sizes, title="[bold]fakes"))
    text = console.export_text()
    for word in ("PASS", "FAIL", "NOT_RUN", "90.00 %", "(interpreted)", "fix: add a GPU", "[bold]"):
        assert word in text


def test_axes() -> None:
    log = Axis(1e-9, 1e-3, log=True)
    assert log.at(1e-9) == 0 and log.at(1e-3) == 100 and log.at(1e-6) == 50
    assert log.at(0.0) == 0 and log.at(5.0) == 100
    assert all(log.low <= t <= log.high for t in log.ticks())
    line = Axis(0.0, 7.3)
    assert line.ticks() == [0, 2, 4, 6]
    assert error_axis([], [0.0]).high == 10
    tight = error_axis([2e-7, 0.0], [1e-5])
    assert tight.low < 2e-7 and tight.high > 1e-5
    assert not time_axis([1.0, 2.0]).log and time_axis([1.0, 20.0]).log
    assert time_axis([]).high == 1


def test_numbers_are_never_invented() -> None:
    assert number(None) == size(None) == closeness(None) == "–"
    assert number(0) == "0" and number(1.234e-7) == "1.2e-7" and number(12.345) == "12.3"
    assert size(0) == "0 B" and size(1536) == "1.5 KiB" and size(3 * 2**30) == "3.00 GiB"
    assert closeness(1 - 1e-6) == "1 − 1.0e-6" and closeness(0.5) == "0.50000"
