"""Full TensorRT 10 and 11 by a double of the documented API: nothing of it has run here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorrt_fakes import FLAGS, FakeConfig, FakeContext, FakeEngine, FullTensorRT

from flowexport.core.errors import InputError
from flowexport.core.steps import last_step
from flowexport.core.types import Options
from flowexport.targets.tensorrt import TARGET, build, sdk
from flowexport.targets.tensorrt.adapter import RtxAdapter
from flowexport.targets.tensorrt.builder import Request, _to_json

PROFILES = [{"x": [[1, 3], [2, 3], [4, 3]]}, {"x": [[5, 3], [8, 3], [16, 3]]}]


def run(
    module: FullTensorRT, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, Any], str]:
    """Build in this process with the double; returns the result and the steps that were told."""
    monkeypatch.setitem(sys.modules, module.__name__, module)  # type: ignore[arg-type]
    (folder / "net.onnx").write_bytes(b"onnx")
    request = Request(folder / "net.onnx", PROFILES, "net", **settings)
    asked = _to_json(sdk.SDK(module.__name__, "0"), request, folder / "net.engine")
    monkeypatch.chdir(folder)
    reading, writing = os.pipe()
    result = build.build(asked, writing)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return result, stream.read()


@pytest.mark.parametrize(("version", "flags"), [("10.9.0", 1 << 1), ("11.4.0", 0)])
def test_build_by_the_documented_calls(
    version: str, flags: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FullTensorRT(version)
    result, steps = run(module, tmp_path, monkeypatch)
    config = module.seen["config"]
    assert module.seen["flags"] == flags, "strongly typed: by flag before 11, always since"
    assert config.cleared == {"TF32"} and config.flags == set()
    assert config.profiling_verbosity == "detailed" and config.max_aux_streams == 0
    assert [p.shapes["x"] for p in config.profiles] == [tuple(p["x"]) for p in PROFILES]
    assert steps == "flowexport step: Building 1/2\n"
    log = tmp_path / "tensorrt.log"
    log.write_text(f"[V] before\n{steps}[V] after\n")
    assert last_step(log) == "Building 1/2" and last_step(tmp_path / "none") == ""
    assert (tmp_path / "net.engine").read_bytes() == b"full engine"
    # The layer table is the engine's own, by the inspector.
    assert result["layers"][1] == {"name": "attn", "type": "PluginV3"} and result["tables"] == 1
    assert result["version"] == version
    assert result["settings"]["compute_capabilities"] == ["of the GPU that built it"]


def test_every_option_of_full_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "timing.cache"
    settings = {
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "refit": True,
        "timing_cache": cache,
    }
    module = FullTensorRT("10.9.0")
    result, _ = run(module, tmp_path, monkeypatch, **settings)
    config = module.seen["config"]
    assert config.flags == {"VERSION_COMPATIBLE", "REFIT"}
    assert config.hardware_compatibility_level == "ampere+"
    assert config.cache.data == b"" and config.mismatch is False
    assert cache.read_bytes() == b"cache of Fake GPU: 3 tactics"
    assert module.seen["allowed"] is True, "the engine's lean runtime must run to be inspected"
    said = result["settings"]
    assert said["version_compatible"] and said["refit"] and said["timing_cache"]
    assert said["compute_capabilities"] == ["8.0 and above"]
    # The next build starts from the cache that the first one left.
    again = FullTensorRT("10.9.1")
    run(again, tmp_path, monkeypatch, timing_cache=cache)
    assert again.seen["config"].cache.data == cache.read_bytes()


def test_same_compute_capability_needs_10_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = {"hardware_compatibility": "same_compute_capability"}
    result, _ = run(FullTensorRT("11.1.0"), tmp_path, monkeypatch, **level)
    assert result["settings"]["compute_capabilities"] == ["as the GPU that built it"]
    with pytest.raises(RuntimeError, match=r"10\.3\.0 has no hardware compatibility same"):
        run(FullTensorRT("10.3.0"), tmp_path, monkeypatch, **level)


def test_timing_cache_of_another_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"cache of another GPU")
    with pytest.raises(RuntimeError, match="of another GPU or TensorRT"):
        run(FullTensorRT("10.9.0"), tmp_path, monkeypatch, timing_cache=cache)
    assert cache.read_bytes() == b"cache of another GPU"


def test_rtx_refuses_a_capability_it_does_not_know() -> None:
    class Config:
        num_compute_capabilities = 0

        def set_compute_capability(self, value: Any, index: int) -> bool:
            return bool(value != "refused")

    known = SimpleNamespace(SM86="8.6", SM75="refused")
    module = SimpleNamespace(ComputeCapability=known)
    for wanted in ("7.5", "9.9"):
        one = RtxAdapter(module, {"compute_capabilities": ["8.6", wanted]})
        with pytest.raises(RuntimeError, match=f"refuses compute capability {wanted}"):
            one._own(Config())


@pytest.mark.parametrize(
    "extra",
    [
        {"refit": True},
        {"version_compatible": True},
        {"hardware_compatibility": "ampere_plus"},
        {"timing_cache": "tactics.cache"},
    ],
)
def test_rtx_does_not_take_an_option_of_full_tensorrt(
    extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = sdk.SDK("tensorrt_rtx", "1")
    monkeypatch.setattr(sdk, "find", lambda gpu: library)
    with pytest.raises(InputError, match=f"{next(iter(extra))} is asked for; TensorRT-RTX does"):
        TARGET.validate(Options(extra=extra))
    TARGET.validate(Options(extra={"hardware_compatibility": "none", "refit": False}))
    library = sdk.SDK("tensorrt", "11")
    TARGET.validate(Options(extra=extra))


def test_the_doubles_have_no_name_that_the_real_interface_lacks() -> None:
    """TensorRT-RTX's bindings have the same classes; a double must not make up its own."""
    trt = pytest.importorskip("tensorrt_rtx")

    def public(one: type) -> set[str]:
        names = set(vars(one)) | set(getattr(one, "__slots__", ()))
        kept = {n for n in names if not n.startswith("_")}
        own = {"profile", "shapes", "addresses", "cache", "cleared", "mismatch", "profiles"}
        return kept - own

    config = public(FakeConfig) - {"flags"}
    assert config <= set(dir(trt.IBuilderConfig)), config - set(dir(trt.IBuilderConfig))
    assert public(FakeEngine) <= set(dir(trt.ICudaEngine))
    assert public(FakeContext) <= set(dir(trt.IExecutionContext))
    assert set(FLAGS) <= set(dir(trt.BuilderFlag))
    assert {"NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"} <= set(
        dir(trt.HardwareCompatibilityLevel)
    )
    assert hasattr(trt.LayerInformationFormat, "JSON")
    assert hasattr(trt.EngineInspector, "get_engine_information")
    assert hasattr(trt.ICudaEngine, "create_engine_inspector")
    assert hasattr(trt.Runtime, "engine_host_code_allowed")
    assert {"phase_start", "step_complete", "phase_finish"} <= set(dir(trt.IProgressMonitor))
