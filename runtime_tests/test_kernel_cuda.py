"""The CUDA build of the kernel: every architecture compiles; without a GPU it refuses clearly."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from flowexport.core.errors import InputError, UnavailableError
from flowexport.ops.flow_attention.tensorrt import build
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary, problem
from flowexport.ops.flow_attention.variant import VARIANTS


@pytest.fixture
def compiler() -> str:
    try:
        return build.nvcc()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_compiles_for_every_architecture(compiler, tmp_path):
    # One call: nvcc then compiles the architectures side by side.
    library = KernelLibrary(build.build_cuda(build.ARCHITECTURES, tmp_path))
    assert not library.is_host
    shape = (8, 4096, 8, 64)
    described = problem(shape, shape, shape, "float16", VARIANTS["vision"])
    assert library.workspace(described) > 0
    dump = shutil.which("cuobjdump")
    if dump:
        held = subprocess.run([dump, "-lelf", library.path], capture_output=True, text=True)
        for capability in build.ARCHITECTURES:
            assert f"sm_{capability}" in held.stdout
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="launch returned"):
            library.launch_pointers(described, 16, 16, 16, 16, 256, 1 << 40)


def test_architectures_are_checked(tmp_path):
    for wrong in ((), ("9.0",), ("ninety",), ("8",)):
        with pytest.raises(InputError, match="compute capabilities"):
            build.build_cuda(wrong, tmp_path)


def test_an_architecture_the_compiler_does_not_know(compiler, tmp_path):
    with pytest.raises(UnavailableError, match="nvcc returned"):
        build.build_cuda(("35",), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "packaged_toolkits", list)
    with pytest.raises(UnavailableError, match=r"no nvcc.*flowexport\[kernel\]"):
        build.build_cuda(("90",), tmp_path)


def test_nvcc_from_pypi_is_found(tmp_path, monkeypatch):
    """The packages of the extra `kernel` put a toolkit into site-packages/nvidia/cu13."""
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(build, "find_spec", lambda name: spec)
    assert build.nvcc() == str(tool)


def test_the_hash_follows_the_source(tmp_path, monkeypatch):
    copy = tmp_path / "cuda"
    shutil.copytree(build.SOURCE, copy)
    before = build.source_hash()
    monkeypatch.setattr(build, "SOURCE", copy)
    assert build.source_hash() == before
    (copy / "row.h").write_text((copy / "row.h").read_text() + "\n")
    assert build.source_hash() != before
