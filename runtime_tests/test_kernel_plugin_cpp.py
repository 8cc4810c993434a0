"""The C++ plugin's logic, over a test double of TensorRT's interfaces and the host kernel.

No SDK headers are to be had from any registry, so that the library compiles
with a real TensorRT is shown only where ``TENSORRT_ROOT`` points to one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flowexport.core.errors import UnavailableError
from flowexport.ops.flow_attention.reference import flow_attention_reference
from flowexport.ops.flow_attention.tensorrt.build import SOURCE, build_host
from flowexport.ops.flow_attention.variant import VARIANTS, FlowVariant

DOUBLE = Path(__file__).with_name("tensorrt_double")
PLUGIN = SOURCE.with_name("plugin_cpp")
# The double numbers the types as TensorRT's documentation does.
DTYPES = {torch.float32: "0", torch.float16: "1", torch.bfloat16: "7"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of the plugin library, over the host kernel, and of the program that drives it."""
    try:
        kernel = build_host()
    except UnavailableError as error:
        pytest.skip(str(error))
    compiler = os.environ.get("CXX") or "g++"
    folder = tmp_path_factory.mktemp("plugin")
    common = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{DOUBLE}"]
    library, driver = folder / "plugin.so", folder / "drive"
    subprocess.run(
        [
            *(*common, f"-I{SOURCE}", "-shared", "-fPIC", "-fvisibility=hidden"),
            *(str(PLUGIN / "flow_attention_plugin.cpp"), str(kernel)),
            *(f"-Wl,-rpath,{kernel.parent}", "-o", str(library)),
        ],
        check=True,
    )
    subprocess.run(
        [*common, "-Wno-sign-compare", str(DOUBLE / "drive.cpp"), "-ldl", "-o", str(driver)],
        check=True,
    )
    return library, driver


def drive(built, folder, q, k, v, variant: FlowVariant, **changes: str):
    library, driver = built
    data = [x.view(torch.uint8).numpy().tobytes() for x in (q, k, v)]
    (folder / "in").write_bytes(b"".join(data))
    b, sinks, heads, width = q.shape
    low, high = variant.clamp or (0.0, 0.0)
    values = {
        **dict(
            zip("BLSHDM", map(str, (b, sinks, k.shape[1], heads, width, v.shape[3])), strict=True)
        ),
        "dtype": DTYPES[q.dtype],
        "feature_map": variant.feature_map,
        "flow_axis": variant.flow_axis,
        "competition_axis": variant.competition_axis,
        "eps": str(variant.eps),
        "outer_eps": str(variant.outer_eps),
        "causal": str(int(variant.causal)),
        "clamped": str(int(variant.clamp is not None)),
        "low": str(low),
        "high": str(high),
        **changes,
    }
    command = [driver, library, folder / "in", folder / "out", *values.values()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    out = folder / "out"
    result = None
    if done.returncode == 0:
        result = torch.frombuffer(bytearray(out.read_bytes()), dtype=q.dtype)
        result = result.reshape(*q.shape[:3], v.shape[3])
    return result, done.stdout


@pytest.mark.parametrize("name", VARIANTS)
def test_a_node_lives_its_life(built, tmp_path, name):
    variant = VARIANTS[name]
    for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 8e-3)):
        q, k, v = (torch.randn(2, 130, 3, d).to(dtype) for d in (16, 16, 24))
        result, said = drive(built, tmp_path, q, k, v, variant)
        assert "name flowexport::FlowAttention 1" in said
        assert result is not None, said
        truth = flow_attention_reference(q.double(), k.double(), v.double(), variant)
        assert float((result.double() - truth).abs().max() / truth.abs().max()) <= limit


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"feature_map": "cosine"}, "feature_map is 'cosine'"),
        ({"flow_axis": "rows"}, "flow_axis is 'rows'"),
        ({"D": "200"}, "widths must be fixed, from 1 to 128"),
        ({"causal": "1", "S": "5"}, "as many sinks as sources"),
        ({"low": "2", "clamped": "1"}, "clamp_low"),
        ({"dtype": "2"}, "failed format"),
    ],
)
def test_bad_input(built, tmp_path, changes, part):
    q, k, v = (torch.randn(1, 10, 2, 8) for _ in range(3))
    result, said = drive(built, tmp_path, q, k, v, VARIANTS["standard"], **changes)
    assert result is None
    assert part in said


def configure(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("cmake or nvcc is not on PATH")
    command = ["cmake", "-S", str(PLUGIN), "-B", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_cmake_without_an_sdk_says_what_to_do(tmp_path):
    done = configure(tmp_path / "a", f"-DTENSORRT_ROOT={tmp_path}")
    if "TensorRT headers:" in done.stdout:
        pytest.skip("a system folder has TensorRT's headers")
    assert done.returncode != 0
    assert "TENSORRT_ROOT" in done.stderr
    old = tmp_path / "old" / "include"
    old.mkdir(parents=True)
    (old / "NvInferRuntime.h").write_text("#define NV_TENSORRT_MAJOR 8\n")
    done = configure(tmp_path / "b", f"-DTENSORRT_ROOT={tmp_path / 'old'}")
    assert done.returncode != 0
    assert "IPluginV3OneRuntime" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("TENSORRT_ROOT" not in os.environ, reason="TENSORRT_ROOT names no SDK")
def test_builds_with_the_users_sdk(tmp_path):
    root = os.environ["TENSORRT_ROOT"]
    done = configure(tmp_path, f"-DTENSORRT_ROOT={root}", "-DCMAKE_CUDA_ARCHITECTURES=89-real")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        ["cmake", "--build", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
