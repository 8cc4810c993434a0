"""flowexport report: its command line, for device reports and for a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from device_tools import Report, device_report, first, save, shifted, write_bundle
from way_tools import refused

from flowexport.cli import run
from flowexport.package import Package, make_package


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def package(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package.open(make_package([bundle], tmp_path_factory.mktemp("package") / "p").path)


@pytest.fixture
def report(package: Package) -> Report:
    return device_report(package)


def test_command_line(
    report: Report,
    package: Package,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = save(tmp_path / "r.json", report), tmp_path / "out"
    common = ["report", "merge", str(file), str(bundle), "--out", str(out)]
    assert run([*common, "--package", str(package.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "PASS" and len(document["rows"]) == 5
    shifted(first(report), 1.0)
    save(file, report)
    assert run([*common, "--package", str(package.path), "--force", "--against", str(out)]) == 4
    captured = capsys.readouterr()
    assert "FAIL" in captured.out and "max_rel" in captured.err and "worse:" in captured.err


def test_report_still_takes_a_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "merge-me"))
    for arguments in (
        ["report", str(copied)],
        ["report", "--json", str(copied)],
        ["report", "bundle", str(copied)],
    ):
        (copied / "report.html").unlink(missing_ok=True)
        assert run(arguments) == 0
        assert str(copied / "report.html") in capsys.readouterr().out
        assert (copied / "report.html").is_file()
    refused(capsys, 2, "BUNDLE", arguments=["report"])
    refused(capsys, 2, "REPORT", arguments=["report", "merge"])
    refused(capsys, 2, "does not exist", arguments=["report", tmp_path / "nowhere"])
    assert run(["report", "--help"]) == 0
    assert "merge" in capsys.readouterr().out
