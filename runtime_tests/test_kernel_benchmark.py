"""The kernel's benchmark command, as far as a machine without a GPU can take it."""

from __future__ import annotations

import json
import time

import pytest
import torch

from flowexport.core.errors import UnavailableError
from flowexport.ops.flow_attention.tensorrt import benchmark, sanitize, timing
from flowexport.ops.flow_attention.tensorrt.build import build_host
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary
from flowexport.ops.flow_attention.variant import VARIANTS


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    try:
        return KernelLibrary(build_host())
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert benchmark.main([]) == 5
    assert "--host" in capsys.readouterr().err


def test_host_checks_every_variant_and_dtype(library, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert benchmark.main(["--host", "--max-tokens", "200", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    seen = {(c["variant"], c["dtype"]) for c in result["checks"]}
    assert seen == {(v, d) for v in VARIANTS for d in benchmark.TOLERANCE}
    assert all(0 < c["error"] <= c["tolerance"] for c in result["checks"])
    assert result["timings"] == []
    assert "checks passed" in capsys.readouterr().out


def test_a_wrong_kernel_is_found_and_not_timed(library, monkeypatch, capsys):
    right = KernelLibrary.__call__

    def wrong(self, q, k, v, variant, **keywords):
        return right(self, q, k, v, variant, **keywords) * 1.01

    monkeypatch.setattr(KernelLibrary, "__call__", wrong)
    assert benchmark.main(["--host", "--max-tokens", "60", "--dtypes", "float32"]) == 4
    assert "FAILED" in capsys.readouterr().out


def test_nan_does_not_pass():
    assert not benchmark.Check("standard", (1,) * 6, "float32", float("nan"), 1e-6).passed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "--variants", "visoin"],
        ["--host", "--dtypes", "int8"],
        ["--host", "--repeats", "0"],
        ["--host", "--json", "/nowhere/x.json", "--max-tokens", "1", "--variants", "rl"],
    ],
)
def test_bad_arguments(library, arguments, capsys):
    assert benchmark.main(arguments) == 2
    assert "expected" in capsys.readouterr().err or "/nowhere" in arguments[2]


def host_clock(call, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def test_timing_goes_on_past_a_contender_that_fails(library, monkeypatch):
    def compiled(form, **keywords):
        def call(*arguments):
            raise torch.OutOfMemoryError("out of memory\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    copy = timing.copy_bandwidth(host_clock, "cpu", elements=1 << 16)
    shape = (1, 64, 32, 2, 8, 8)
    timings = list(
        timing.time_shape(library, VARIANTS["standard"], shape, "float32", host_clock, copy, 5)
    )
    named = {t.contender: t for t in timings}
    assert named["published, torch.compile"].failure == "OutOfMemoryError: out of memory"
    for name in ("kernel", "published, eager", "softmax attention, SDPA"):
        one = named[name]
        assert one.failure is None
        assert 0 < one.low <= one.microseconds <= one.high
    # q and k three times, v and the result once: 4·2·8·(3·96 + 96) bytes.
    assert named["kernel"].bytes_moved == 4 * 2 * 8 * (3 * 96 + 96)
    share = 100 * named["kernel"].bytes_moved / (named["kernel"].microseconds / 1e6) / copy
    assert named["kernel"].percent_of_copy == pytest.approx(share)
    assert named["published, eager"].percent_of_copy is None


def test_long_causal_eager_is_left_out(library):
    q, k, v = timing.draw((1, 2048, 2048, 1, 8, 8), "float32", "cpu")
    names = timing.contenders(library, VARIANTS["causal"], q, k, v)
    assert "published, eager" not in names
    assert any(name.startswith("causal_chunked") for name in names)


def test_gpu_state_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert timing.gpu_state() == {}


def test_gains_answer_the_questions():
    shape = (1, 64, 64, 2, 8, 8)
    times = {
        timing.KERNEL: 20.0,
        timing.GRAPH: 10.0,
        timing.EAGER: 500.0,
        "published, torch.compile": 80.0,
        "token_major, torch.compile": 40.0,
        "channel_first, torch.compile": 60.0,
        timing.FLASH: 25.0,
    }
    rows = [timing.Timing(shape, "float16", name, t) for name, t in times.items()]
    rows.append(timing.Timing(shape, "float16", timing.SDPA, failure="out of memory"))
    # Another shape, where the kernel itself failed: nothing to compare.
    rows.append(timing.Timing((2, *shape[1:]), "float16", timing.EAGER, 1.0))
    found = {g.against: g.times for g in timing.gains(rows)}
    assert found == {
        timing.EAGER: 50.0,
        "published, torch.compile": 8.0,
        "token_major, torch.compile": 4.0,
        timing.FLASH: 2.5,
    }


def test_the_shapes_are_those_of_the_comparison():
    long = {s[1] for s in benchmark.TIMED if s[4] == 64 and s[0] == 8}
    assert long == {196, 1024, 4096, 16384, 65536}
    for batch in (1, 64):
        vision = {(s[1], s[4]) for s in benchmark.TIMED if s[0] == batch and s[3] == 12}
        assert vision == {(3136, 8), (784, 16), (196, 32), (49, 64)}


def fake_sanitizer(folder, monkeypatch, complains):
    """A compute-sanitizer that does not run its program, and complains under one tool."""
    tool = folder / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {folder}/said\n'
        f'if [ "$2" = "{complains}" ]; then echo "========= ERROR SUMMARY: 3 errors"; exit 86; fi\n'
        'echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(("complains", "code"), [("none", 0), ("racecheck", 4)])
def test_sanitize_runs_every_tool(complains, code, library, tmp_path, monkeypatch, capsys):
    fake_sanitizer(tmp_path, monkeypatch, complains)
    monkeypatch.setattr(benchmark, "_require_gpu", lambda: "90")
    monkeypatch.setattr(KernelLibrary, "is_host", False, raising=False)

    def opened(self, path):
        self.path, self.is_host = path, False

    monkeypatch.setattr(KernelLibrary, "__init__", opened)
    path = tmp_path / "result.json"
    arguments = ["--sanitize", "--library", str(library.path), "--variants", "vision,causal"]
    assert benchmark.main([*arguments, "--json", str(path)]) == code
    runs = json.loads(path.read_text())["sanitizer"]
    assert [r["tool"] for r in runs] == list(sanitize.TOOLS)
    assert [r["tool"] for r in runs if not r["clean"]] == ([complains] if code else [])
    asked = (tmp_path / "said").read_text().splitlines()
    assert len(asked) == 4
    for line, tool in zip(asked, sanitize.TOOLS, strict=True):
        assert line.startswith(f"--tool {tool} --error-exitcode 86")
        assert "--check-only" in line and "--variants vision,causal" in line
        assert f"--library {library.path}" in line
    if code:
        assert "compute-sanitizer racecheck: exit code 86" in capsys.readouterr().out


def test_sanitize_without_the_tool_or_with_host(library, tmp_path, monkeypatch, capsys):
    assert benchmark.main(["--host", "--sanitize"]) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(sanitize, "packaged_toolkits", list)
    with pytest.raises(UnavailableError, match="CUDA_HOME"):
        sanitize.find_sanitizer()
