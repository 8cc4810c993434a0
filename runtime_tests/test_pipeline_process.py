"""The converter's process: crashes, refusals and interrupts, without a converter."""

from __future__ import annotations

import errno
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from way_tools import alive, wait_for

from flowexport import process, worker
from flowexport.core.errors import (
    ConversionError,
    FlowExportError,
    InputError,
    OutputError,
    UnknownNameError,
)
from flowexport.core.types import Options


def convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, **more: Any
) -> process.Conversion:
    """Run ``script`` in place of the worker; ``fd`` is where its answer goes."""
    real = process._run

    def run(command: list[str], log: Path, tick: Any) -> tuple[int, bytes]:
        head = "import os, sys, json, time; fd = int(sys.argv[2]); "
        return real([command[0], "-c", head + script, command[3]], log, tick)

    monkeypatch.setattr(process, "_run", run)
    (tmp_path / "root").mkdir()
    return process.convert_in_child(
        target="onnx",
        model="tiny",
        program=tmp_path / "program.pt2",
        options=Options(),
        root=tmp_path / "root",
        log=tmp_path / "logs" / "onnx.log",
        **more,
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('deep in the converter', flush=True); os.abort()", ["SIGABRT", "deep in the"]),
        ("os.kill(os.getpid(), 9)", ["SIGKILL", "out of memory"]),
        ("print('said before'); sys.exit(7)", ["code 7", "said before"]),
        ("print('1 %\\r50 %\\rall done\\r'); os.abort()", ["ends:\n  all done"]),
        ("pass", ["no result"]),
        ("os.write(fd, b'{\"artif')", ["no result"]),
    ],
)
def test_a_death_is_told_with_the_logs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: list[str]
) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path, monkeypatch, script)
    assert caught.value.exit_code == 3
    for word in ["convert onnx tiny", *words]:
        assert word in caught.value.message


def answer(error: BaseException) -> str:
    text = json.dumps({"error": worker.describe_error(error)})
    return f"os.write(fd, {text.encode()!r})"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("convert onnx: x has 3; expected 4.", fix="say 4"), InputError),
        (UnknownNameError("form", "f", ["g"]), UnknownNameError),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (RuntimeError("out of luck\nsecond line"), ConversionError),
        (MemoryError(), ConversionError),
    ],
)
def test_the_childs_error_arrives_with_its_class(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[FlowExportError],
) -> None:
    with pytest.raises(kind) as caught:
        convert(tmp_path, monkeypatch, answer(error))
    if isinstance(error, FlowExportError):
        assert (caught.value.message, caught.value.fix) == (error.message, error.fix)
    assert "second line" not in caught.value.message


def test_a_promised_file_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = {
        "target": "onnx", "path": "onnx/none.onnx", "sha256": "0", "size_bytes": 1,
        "precision": "fp32", "model": "m", "recipe_sha256": "0", "form": "f",
        "inputs": [], "outputs": [],
    }  # fmt: skip
    result = json.dumps({"result": artifact, "peak_rss_bytes": 1})
    with pytest.raises(ConversionError, match="left no file"):
        convert(tmp_path, monkeypatch, f"os.write(fd, {result.encode()!r})")


def test_an_interrupt_kills_the_child_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    script = (
        "import subprocess; c = subprocess.Popen(['sleep', '100']);"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{c.pid}}'); time.sleep(100)"
    )

    def tick(seconds: float) -> None:
        if pids.exists() and len(pids.read_text().split()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, monkeypatch, script, tick=tick)
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not alive(pid), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, time; from pathlib import Path\n"
        "from flowexport.worker import die_with_parent\n"
        "parent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    die_with_parent(parent)\n"
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(100)\n"
        "time.sleep(100)\n"
    )
    import subprocess

    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        child = int((tmp_path / "pid").read_text())
        assert alive(child)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not alive(child), 10)


def test_a_grandchild_that_keeps_the_pipe_does_not_hang_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import subprocess; subprocess.Popen(['sleep', '20'], pass_fds=(fd,));"
        f"{answer(RuntimeError('done quickly'))}"
    )
    started = time.monotonic()
    with pytest.raises(ConversionError, match="done quickly"):
        convert(tmp_path, monkeypatch, script)
    assert time.monotonic() - started < 15


def test_a_worker_reports_its_memory() -> None:
    assert 1 << 20 < worker.peak_rss_bytes() < 1 << 40


def test_descriptors_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("no /proc/self/fd to count open descriptors with")
    before = len(list(open_files.iterdir()))
    with pytest.raises(ConversionError):
        convert(tmp_path, monkeypatch, "pass")
    assert len(list(open_files.iterdir())) == before
