"""Damage to a finished bundle, failing converters, interrupts: nothing half, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from once import session_folder
from way_tools import (
    RECIPE,
    alive,
    finished_bundle,
    names,
    refused,
    start,
    stop,
    wait_for,
    write_model,
    write_plugin,
)

from flowexport.bundle import Bundle
from flowexport.cli import run
from flowexport.core.hashing import sha256_file

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_bundle(session_folder(tmp_path_factory))[0]


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def verify(capsys: Capture, bundle: Path, code: int) -> tuple[dict[str, Any], str]:
    assert run(["verify", str(bundle), "--json"]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    document: dict[str, Any] = json.loads(captured.out)
    return document, captured.err


def artifact(bundle: Path) -> Path:
    return Bundle.open(bundle).artifacts()["onnx"].path


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("damage", ["one byte", "truncated", "gone", "other weights"])
def test_damaged_artifact(bundle: Path, capsys: Capture, damage: str) -> None:
    path = artifact(bundle)
    content = bytearray(path.read_bytes())
    if damage == "one byte":
        content[len(content) // 2] ^= 1
    elif damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "other weights":
        content = bytearray(_with_other_weights(path))
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    document, err = verify(capsys, bundle, 4)
    assert document["verdict"] == document["targets"]["onnx"]["verdict"] == "FAIL"
    reason = document["targets"]["onnx"]["reason"]
    assert ("missing" if damage == "gone" else "sha256") in reason
    assert err.startswith("error: verify onnx: ") and reason in err


def test_bench_runs_no_bytes_that_the_manifest_does_not_vouch_for(
    bundle: Path, capsys: Capture
) -> None:
    path = artifact(bundle)
    path.write_bytes(path.read_bytes()[:-100])
    assert run(["bench", str(bundle), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["targets"]["onnx"]
    assert "sha256" in told["not_run"] and told["iterations"] == 0
    path.unlink()
    assert run(["bench", str(bundle), "--json"]) == 0
    assert "is missing" in json.loads(capsys.readouterr().out)["targets"]["onnx"]["not_run"]


def test_an_edited_tolerance_is_refused(bundle: Path, capsys: Capture) -> None:
    edit(bundle / "manifest.json", lambda m: m["targets"]["onnx"]["tolerance"].update(max_rel=1.0))
    refused(capsys, 2, "max_rel 1.0", "expected 1e-05", arguments=["verify", bundle])


def test_changed_weights_with_a_matching_hash_fail_by_the_numbers(
    bundle: Path, capsys: Capture
) -> None:
    path = artifact(bundle)
    path.write_bytes(_with_other_weights(path))
    digest = sha256_file(path)
    edit(bundle / "manifest.json", lambda m: m["targets"]["onnx"].update(sha256=digest))
    document, _ = verify(capsys, bundle, 4)
    assert "max_rel" in document["targets"]["onnx"]["reason"]


def test_a_fusion_that_is_not_there_fails(bundle: Path, capsys: Capture) -> None:
    wanted = {"FlowAttention": 2}
    edit(bundle / "manifest.json", lambda m: m["targets"]["onnx"].update(required_fusions=wanted))
    document, _ = verify(capsys, bundle, 4)
    assert "FlowAttention" in document["targets"]["onnx"]["reason"]


@pytest.mark.parametrize("file", ["golden/cases.safetensors", "golden/index.json"])
def test_damaged_reference(bundle: Path, capsys: Capture, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[-20] ^= 1
    (bundle / file).write_bytes(content)
    refused(capsys, 2, file, "sha256", arguments=["verify", bundle])
    (bundle / file).unlink()
    refused(capsys, 2, file, "is missing", arguments=["bench", bundle])


def test_unknown_target_of_a_bundle(bundle: Path, capsys: Capture) -> None:
    for verb in ("verify", "bench"):
        refused(capsys, 2, "'onx'", "'onnx'?", arguments=[verb, bundle, "--target", "onx"])


def test_a_failed_verification_leaves_its_evidence(tmp_path: Path, capsys: Capture) -> None:
    recipe = write_model(tmp_path, RECIPE.replace("1.0e-5", "1.0e-12"))
    out = tmp_path / "out"
    assert run(["convert", str(recipe), "--out", str(out), "--no-bench", "--json"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "FAIL"
    assert "max_rel" in captured.err and "Traceback" not in captured.err
    assert json.loads((out / "report.json").read_text())["verdict"] == "FAIL"
    assert "FAIL" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aborter", ["SIGABRT", "the fake converter begins", "The whole log: "]),
        ("raiser", ["RuntimeError: the fake converter is out of luck"]),
        ("refuser", ["x has rank 7; expected 4.", "Fix: reshape x"]),
    ],
)
def test_a_failed_conversion_leaves_its_log_alone(
    tmp_path: Path, name: str, words: list[str]
) -> None:
    env = write_plugin(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    recipe = write_model(tmp_path, RECIPE.replace("onnx: {}", f"{name}: {{}}"))
    process = start("convert", recipe, "--out", work / "out", env=env)
    out, err = process.communicate()
    assert process.returncode == 3, err
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in err
    assert names(work) == {"out.failed.log"}
    assert "the fake converter begins" in (work / "out.failed.log").read_text()


def test_a_target_that_is_not_available(tmp_path: Path) -> None:
    env = write_plugin(tmp_path)
    recipe = write_model(tmp_path)
    for option in ("--target", "--require"):
        process = start("convert", recipe, option, "absent", "--out", tmp_path / "out", env=env)
        out, err = process.communicate()
        assert process.returncode == 5 and out == ""
        assert "absent has no runtime" in err and "Fix: pip install fake-runtime" in err
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        env = write_plugin(tmp_path)
        for target in ("filler", "onnx"):
            recipe = write_model(tmp_path, RECIPE.replace("onnx: {}", f"{target}: {{}}"))
            if target == "onnx":  # the parent's own files no longer fit
                (disk / "ballast").write_bytes(bytes(4 * 2**20 - 3 * 4096))
            before = names(disk)
            process = start("convert", recipe, "--out", disk / "out", env=env)
            out, err = process.communicate()
            assert process.returncode == 2, err
            assert "the disk is full" in err and "--out" in err and "Traceback" not in err
            assert out == "" and names(disk) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_and_a_second_conversion(
    tmp_path: Path, number: signal.Signals, capsys: Capture
) -> None:
    env = write_plugin(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    recipe = write_model(tmp_path, RECIPE.replace("onnx: {}", "sleeper: {}"))
    pid = Path(env["FAKE_PID"])
    process = start("convert", recipe, "--out", work / "out", env=env)
    try:
        wait_for(lambda: process.poll() is not None or (pid.exists() and pid.read_text() != ""))
        assert process.poll() is None, process.communicate()[1]
        assert any(n.startswith(".out.partial-") for n in names(work))
        second = write_model(tmp_path)
        refused(
            capsys,
            2,
            f"process {process.pid}",
            arguments=["convert", second, "--out", work / "out"],
        )
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        stop(process)
    assert process.returncode == 130, err
    assert err.strip() == "error: interrupted." and out == ""
    assert names(work) == set()
    assert not alive(int(pid.read_text()))


def test_kill_9_and_the_next_run(tmp_path: Path, bundle: Path) -> None:
    env = write_plugin(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    shutil.move(bundle, work / "out")
    old = sha256_file(work / "out" / "manifest.json")
    recipe = write_model(tmp_path, RECIPE.replace("onnx: {}", "sleeper: {}"))
    pid = Path(env["FAKE_PID"])
    process = start("convert", recipe, "--out", work / "out", "--force", env=env)
    try:
        wait_for(lambda: process.poll() is not None or (pid.exists() and pid.read_text() != ""))
        assert process.poll() is None, process.communicate()[1]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finally:
        stop(process)
    wait_for(lambda: not alive(int(pid.read_text())), 20)
    assert sha256_file(work / "out" / "manifest.json") == old, "the old bundle is untouched"
    assert len(names(work)) == 3, "the old bundle, a lock file and a hidden half folder"
    recipe = write_model(tmp_path, RECIPE.replace("onnx: {}", "steady: {}"))
    process = start("convert", recipe, "--out", work / "out", "--force", env=env)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert names(work) == {"out"} and list(Bundle.open(work / "out").artifacts()) == ["steady"]


def _with_other_weights(path: Path) -> bytes:
    """Return the model with its largest tensor scaled by 1.01."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda t: int(np.prod(t.dims)))
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values * values.dtype.type(1.01), tensor.name))
    return bytes(model.SerializeToString())
