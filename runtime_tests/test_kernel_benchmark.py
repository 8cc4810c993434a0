"""The kernel's benchmark command, as far as a machine without a GPU can take it."""

from __future__ import annotations

import json
import time

import pytest
import torch

from flowexport.core.errors import UnavailableError
from flowexport.ops.flow_attention.tensorrt import benchmark
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
    copy = benchmark.copy_bandwidth(host_clock, "cpu", elements=1 << 16)
    shape = (1, 64, 32, 2, 8, 8)
    timings = list(
        benchmark.time_shape(library, VARIANTS["standard"], shape, "float32", host_clock, copy, 5)
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
    q, k, v = benchmark.draw((1, 2048, 2048, 1, 8, 8), "float32", "cpu")
    names = benchmark.contenders(library, VARIANTS["causal"], q, k, v)
    assert "published, eager" not in names
    assert any(name.startswith("causal_chunked") for name in names)


def test_gpu_state_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert benchmark.gpu_state() == {}
