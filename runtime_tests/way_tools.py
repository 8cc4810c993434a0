"""A tiny model, fake targets as an outside package, and command lines run here or in a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from once import once

from flowexport import process as children
from flowexport import worker
from flowexport.cli import run

MODEL = """
import torch
from torch import nn
from flowexport.ops.flow_attention import VARIANTS, flow_attention

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return self.head(flow_attention(q, k, v, VARIANTS["timeseries"]).flatten(2).mean(1))

def build():
    return Tiny()

def no_module():
    return 3

def raising():
    raise RuntimeError("no weights here")

SIZE = 3
"""

RECIPE = """schema: flowexport.recipe/1
name: tiny
model: tiny_model.py:build
inputs: {x: batchx6x8}
outputs: [scores]
labels: [a, b, c]
targets:
  onnx: {}
tolerances:
  fp32: {max_rel: 1.0e-5, min_top1_agreement: 1.0, reason: one layer of short sums in fp32}
fusions:
  onnx: {FlowAttention: 1}
bench: {warmup: 1, min_runs: 3, min_seconds: 0}
"""

PLUGIN = '''
import os, time
from pathlib import Path
from flowexport.core.errors import ConversionError, UnavailableError
from flowexport.core.hashing import sha256_tree
from flowexport.core.types import Artifact, Availability, Precision

class Fake:
    """Writes a file and does what its mode says on the way; runs nowhere."""
    suffix = ".fake"
    precisions = (Precision.FP32,)

    def __init__(self, name, converts=True):
        self.name = name
        self.converts = converts

    def probe(self):
        fix = "pip install fake-runtime"
        return Availability(self.converts, False, {"fake": "1"}, f"{self.name} has no runtime", fix)

    def validate(self, options):
        pass

    def convert(self, program, options, out):
        print("the fake converter begins", flush=True)
        path = out / "model.fake"
        if self.name == "sleeper":
            path.write_text("half")
            Path(os.environ["FAKE_PID"]).write_text(str(os.getpid()))
            time.sleep(100)
        if self.name == "aborter":
            os.abort()
        if self.name == "raiser":
            raise RuntimeError("the fake converter is out of luck")
        if self.name == "refuser":
            raise ConversionError("convert refuser: x has rank 7; expected 4.", fix="reshape x")
        if self.name == "filler":
            path.write_bytes(bytes(50_000_000))
        path.write_text("done")
        return Artifact(
            self.name, path, sha256_tree(path), 4, options.precision, program.model,
            program.recipe_sha256, "published", program.inputs, program.outputs,
        )

    def load(self, artifact, *, threads=1):
        raise UnavailableError(f"{self.name} has no runtime.", fix="pip install fake-runtime")

    def inspect(self, path):
        return {"inputs": [], "outputs": [], "operators": {}, "fusions": {}}

steady, sleeper, aborter, raiser, refuser, filler = (
    Fake(n) for n in ("steady", "sleeper", "aborter", "raiser", "refuser", "filler")
)
absent = Fake("absent", converts=False)
'''
FAKES = ("steady", "sleeper", "aborter", "raiser", "refuser", "filler", "absent")


def write_model(folder: Path, recipe: str = RECIPE) -> Path:
    """Write the tiny model and its recipe; return the recipe's path."""
    (folder / "tiny_model.py").write_text(MODEL)
    path = folder / "tiny.yaml"
    path.write_text(recipe)
    return path


def write_plugin(folder: Path) -> Mapping[str, str]:
    """Write an outside package with fake targets; return the environment that finds it."""
    site = folder / "site"
    info = site / "fake_targets-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "fake_targets.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-targets\nVersion: 1.0\n")
    lines = [f"{name} = fake_targets:{name}" for name in FAKES]
    lines.append("broken = fake_targets_that_never_were:TARGET")
    (info / "entry_points.txt").write_text("[flowexport.targets]\n" + "\n".join(lines) + "\n")
    return {"PYTHONPATH": str(site), "FAKE_PID": str(folder / "pid"), "OMP_NUM_THREADS": "1"}


def finished_bundle(base: Path) -> tuple[Path, str, str]:
    """Convert the tiny model once a test session; read only.

    Args:
        base: :func:`once.session_folder`.

    Returns:
        The bundle, and what ``convert --json`` wrote to stdout and stderr.
    """

    def make(folder: Path) -> None:
        process = start("convert", write_model(folder), "--json", cwd=folder)
        out, err = process.communicate()
        (folder / "code").write_text(str(process.returncode))
        (folder / "stdout").write_text(out)
        (folder / "stderr").write_text(err)

    folder = once(base, "finished", make)
    out, err = (folder / "stdout").read_text(), (folder / "stderr").read_text()
    assert (folder / "code").read_text() == "0", err
    return folder / "out" / "tiny", out, err


@contextlib.contextmanager
def converted_here() -> Iterator[None]:
    """Let converters run in this process: a child imports the toolchains anew, 10 s each."""

    def run_child(module: str, request: dict[str, Any], **given: Any) -> dict[str, Any]:
        assert module == "flowexport.worker"
        return {"result": worker.convert(request), "seconds": 0.0, "peak_rss_bytes": 1}

    with mock.patch.object(children, "run_child", run_child):
        yield


def start(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Start ``flowexport`` in a process of its own, as a terminal would."""
    # A shell's background job, and with it a test run in one, ignores SIGINT; a child inherits it.
    return subprocess.Popen(
        [sys.executable, "-m", "flowexport", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def refused(
    capsys: pytest.CaptureFixture[str], code: int, *words: str, arguments: list[object]
) -> str:
    """Run a command line here; require its exit code and the words on stderr, and no traceback."""
    assert run([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "", "a refused run prints nothing on stdout"
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    for word in words:
        assert word in captured.err, f"{word!r} is not in: {captured.err}"
    return captured.err


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def stop(process: subprocess.Popen[str]) -> None:
    """End a process of ours that a failed test left."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}
