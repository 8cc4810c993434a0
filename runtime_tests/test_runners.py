"""Other machines: the process protocol, what is refused, and the real ones where there are any."""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from once import session_folder
from way_tools import finished_bundle, refused

import flowexport
from flowexport.bundle import Bundle
from flowexport.cli import run
from flowexport.core.errors import (
    InputError,
    UnavailableError,
    UnknownNameError,
    VerificationError,
)
from flowexport.core.types import Artifact, Verdict
from flowexport.registry import TARGETS
from flowexport.runners import RUNNERS, Machine, RunnerTarget, debian, machine, prepare, probe

pytest_plugins = ["web_fixtures"]  # the shipped models' bundles

HERE = Machine(
    name="here",
    targets=("onnx",),
    execution="emulated",
    command=(sys.executable, "-I", "-S"),
    site=Path(sysconfig.get_path("purelib")),
    environment={"OMP_NUM_THREADS": "1"},
)


@pytest.fixture
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_bundle(session_folder(tmp_path_factory))[0]


@pytest.fixture
def artifact(bundle: Path) -> Artifact:
    return Bundle.open(bundle).artifacts()["onnx"]


def load(artifact: Artifact, where: Machine = HERE) -> Any:
    return RunnerTarget(TARGETS.get("onnx"), where).load(artifact)


def test_a_session_in_another_process_gives_the_targets_own_values(artifact: Artifact) -> None:
    rng = np.random.default_rng(0)
    with TARGETS.get("onnx").load(artifact) as own, load(artifact) as other:
        for batch in (1, 3):
            x = rng.standard_normal((batch, 6, 8)).astype(np.float32)
            assert np.array_equal(own.run({"x": x})["scores"], other.run({"x": x})["scores"])
        assert other.info.label == f"onnxruntime {own.info.version} emulated (here)"
        assert other.info.details["python"].count(".") == 2
        process, log = other._process, other._log
        with pytest.raises(InputError, match="x has shape 1x5x8; expected batchx6x8"):
            other.run({"x": np.zeros((1, 5, 8), np.float32)})
    assert log.closed and process.poll() is not None


def test_what_the_other_process_says_is_told(artifact: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(InputError, match=r"run onnx .* on here: \S"):
        load(replace(artifact, path=broken))
    with load(artifact) as session:
        session._process.kill()
        with pytest.raises(VerificationError, match=r"on here: the process ended with -9"):
            session.run({"x": np.zeros((1, 6, 8), np.float32)})
    with pytest.raises(InputError, match="No module named 'numpy'"):
        load(artifact, replace(HERE, site=tmp_path))


def test_a_file_that_an_old_runtime_refuses_is_told_with_the_option_for_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    old = replace(HERE, name="tflite-2.14")
    with pytest.raises(InputError) as raised:
        load(replace(artifact, path=broken), old)
    assert "compat: tflite-2.14" in str(raised.value.fix)
    with pytest.raises(InputError) as raised:
        load(replace(artifact, path=broken, details={"compat": "tflite-2.14"}), old)
    assert raised.value.fix is None, "it was made for it"


def test_what_a_runner_does_not_run_is_not_run(artifact: Artifact) -> None:
    with pytest.raises(UnavailableError, match="runner here: runs tflite alone"):
        load(artifact, replace(HERE, targets=("tflite",)))
    with pytest.raises(UnavailableError, match="has 200000000 bytes; expected at most 67108864"):
        load(replace(artifact, size_bytes=200_000_000))


def test_verify_on_a_runner_is_labelled_and_shortened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS, "here", lambda tell: HERE)  # type: ignore[arg-type]
    result = flowexport.verify(bundle, runner="here")
    report = result.parity["onnx"]
    assert report.verdict is Verdict.PASS and report.execution == "emulated"
    assert report.runtime_label is not None and report.runtime_label.endswith("emulated (here)")
    assert result.latency == {}
    artifact = Bundle.open(bundle).artifacts()["onnx"]
    monkeypatch.setitem(RUNNERS, "here", lambda tell: replace(HERE, targets=("tflite",)))  # type: ignore[arg-type]
    report = flowexport.verify(bundle, runner="here").parity["onnx"]
    assert report.verdict is Verdict.NOT_RUN and "runs tflite alone" in str(report.reason)
    assert artifact.path.exists()


def test_wrong_runners_are_told_at_once(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'qemu-aarch64'"):
        prepare("qemu-arm64")
    refused(capsys, 2, "unknown runner 'quemu'", arguments=["verify", bundle, "--runner", "quemu"])
    arguments = ["verify", bundle, "--runner", "qemu-aarch64", "--save"]
    refused(capsys, 2, "--save with --runner would replace", arguments=arguments)
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    refused(capsys, 5, "this machine is aarch64 itself", arguments=arguments[:-1])


def test_a_system_without_debian_says_what_mends_it(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLOWEXPORT_CACHE", str(tmp_path))
    arguments = ["verify", bundle, "--runner", "qemu-aarch64"]
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(capsys, 5, "apt-get, dpkg-deb is missing", "Fix: run it on Debian", arguments=arguments)
    for tool, code in (("dpkg-deb", 0), ("dpkg", 0), ("apt-get", 0)):
        (tmp_path / tool).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "dpkg")
    refused(capsys, 5, "apt knows no Debian archive", "apt-get update", arguments=arguments)
    (tmp_path / "apt-get").write_text(
        '#!/bin/sh\n[ "$1" = indextargets ] && echo "Debian http://127.0.0.1/" && exit 0\n'
        'echo "E: no route to the archive" >&2\nexit 100\n'
    )
    refused(capsys, 5, "apt-get update failed: E: no route", arguments=arguments)
    assert not list((tmp_path / "flowexport" / "runners").iterdir()), "nothing half is left"


def test_an_old_runtime_without_its_python_says_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.sys, "version_info", (3, 12, 1))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"wheels for Python 3\.11, 3\.10, 3\.9; this is 3"):
        prepare("tflite-2.14")


def test_doctor_tells_what_a_runner_lacks_and_fetches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOWEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "require_debian", lambda where: None)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    for name in RUNNERS:
        found = probe(name)
        assert found.available and not found.ready and "MB on disk" in found.fetches
        assert found.folder is not None and found.folder.is_relative_to(tmp_path)
    found.folder.mkdir(parents=True)
    assert not probe(name).ready, "half set up"
    (found.folder / "facts.json").write_text("{}")
    assert probe(name).ready
    monkeypatch.undo()
    monkeypatch.setenv("FLOWEXPORT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["runners"]
    assert told["tflite-2.14"]["fix"] == "python -m ensurepip"
    assert "apt-get, dpkg-deb is missing" in told["qemu-aarch64"]["reason"]
    assert not any(entry["available"] or entry["ready"] for entry in told.values())
    assert not (tmp_path / "empty").exists()
    with pytest.raises(UnknownNameError):
        probe("qemu-arm64")


@pytest.mark.slow
def test_shipped_models_run_on_emulated_arm(bundles: list[Path]) -> None:
    """Golden cases, the first samples and 128 steps of every shipped model, on both runtimes."""
    try:
        prepare("qemu-aarch64")
    except UnavailableError as error:
        pytest.skip(f"{error.message} {error.fix}")
    assert {b.name for b in bundles} == {"digits", "japanese-vowels", "japanese-vowels-streaming"}
    for path in bundles:
        golden = json.loads((path / "golden" / "index.json").read_text())["cases"]
        result = flowexport.verify(path, runner="qemu-aarch64", samples=1)
        for name in ("onnx", "tflite"):
            report = result.parity[name]
            assert report.verdict is Verdict.PASS, report.reason
            assert str(report.runtime_label).endswith("emulated (qemu-aarch64)")
            assert report.runtime is not None and report.runtime["details"]["machine"] == "aarch64"
            assert report.accuracy is not None and report.accuracy.samples == 1
            assert {c.case for c in report.cases} >= set(golden)
            if path.name.endswith("streaming"):
                assert report.stream is not None and report.stream.steps == 128
