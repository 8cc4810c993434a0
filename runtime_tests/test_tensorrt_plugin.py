"""The builder and the plugin: one ONNX file for all, and what goes wrong with plugins."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_programs as programs
import pytest

from flowexport.core.errors import ConversionError, InputError, UnavailableError
from flowexport.core.types import Artifact, Dataset, Options, Precision
from flowexport.ops.flow_attention.tensorrt import build as kernel_build
from flowexport.targets.onnx import TARGET as ONNX
from flowexport.targets.tensorrt import TARGET, convert, sdk
from flowexport.targets.tensorrt.builder import Build, Plugin, Request, build_engine
from flowexport.targets.tensorrt.options import TensorRTOptions
from flowexport.targets.tensorrt.source import too_wide, with_plugin, without_plugin

needs_rtx = pytest.mark.skipif(
    sdk.installed("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed (pip install 'flowexport[tensorrt]')",
)
SHAPES = [{"x": [[1, programs.LENGTH, programs.WIDTH]] * 2 + [[4, programs.LENGTH, 16]]}]


@pytest.fixture(scope="module")
def model() -> Any:
    return programs.net("vision", "causal")


@pytest.fixture(scope="module")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("onnx")
    return ONNX.convert(programs.program(model, "net"), Options(), folder)


def build(onnx_file: Path, folder: Path, plugin: Plugin | None, **settings: Any) -> Build:
    library = sdk.installed("tensorrt_rtx")
    assert library
    folder.mkdir(exist_ok=True)
    settings = {"compute_capabilities": ["8.9"], "timeout": 300, **settings}
    request = Request(onnx_file, SHAPES, "net", plugin, **settings)
    return build_engine(library, request, folder / "net.engine")


@needs_rtx
def test_one_file_for_onnx_runtime_and_both_builds(
    model: Any, source: Artifact, tmp_path: Path
) -> None:
    before = source.path.read_bytes()
    x = programs.sample(3)
    with ONNX.load(source) as session:
        result = session.run({"x": x})["logits"]
    assert programs.relative(result, programs.truth(model, x)) < 1e-5
    path, count = with_plugin(source.path, tmp_path, "convert tensorrt net")
    assert path == source.path and count == 2, "the plugin's build takes the file as it is"
    fused = build(path, tmp_path / "fused", Plugin(count))
    plain = build(without_plugin(source.path, tmp_path), tmp_path / "plain", None)
    assert len(fused.plugin_layers) == 2 and plain.plugin_layers == ()
    # Each plugin layer carries its node's name.
    assert [fused.layers[i].name.split("_myl")[0] for i in fused.plugin_layers] == ["one", "two"]
    assert len(fused.layers) < len(plain.layers)
    assert source.path.read_bytes() == before


def other_version(source: Artifact, folder: Path) -> Path:
    loaded = onnx.load(source.path)
    node = next(n for n in loaded.graph.node if n.op_type == "FlowAttention")
    next(a for a in node.attribute if a.name == "plugin_version").s = b"2"
    path = folder / "other.onnx"
    onnx.save(loaded, path)
    return path


def test_unknown_plugin_version_is_refused_before_the_build(
    source: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=r"node one .*'2'.*expected.*inlines") as told:
        with_plugin(other_version(source, tmp_path), tmp_path, "convert tensorrt net")
    assert told.value.exit_code == 3 and "--no-plugin" in str(told.value)


@needs_rtx
def test_unknown_plugin_version_is_not_inlined_silently(source: Artifact, tmp_path: Path) -> None:
    """TensorRT takes the function's body and says nothing; the count of layers does."""
    other = other_version(source, tmp_path)
    with pytest.raises(ConversionError, match="has 1 FlowAttention plugin layers; expected 2"):
        build(other, tmp_path, Plugin(2))
    assert not (tmp_path / "net.engine").exists()


@needs_rtx
def test_plugins_nobody_asked_for_are_counted_too(source: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has 2 FlowAttention plugin layers; expected 1"):
        build(source.path, tmp_path, Plugin(1))


@needs_rtx
def test_library_that_is_no_plugin(source: Artifact, tmp_path: Path) -> None:
    library = tmp_path / "plugin.so"
    library.write_text("no library")
    with pytest.raises(ConversionError, match=r"plugin library .*plugin\.so"):
        build(source.path, tmp_path / "engine", Plugin(2, library))


@needs_rtx
def test_build_out_of_memory_is_told_and_leaves_nothing(
    source: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real builder in an address space that does not hold it."""
    module = tmp_path / "limited_rtx.py"
    module.write_text(
        "import resource\n"
        "import tensorrt_rtx as trt\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + (24 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "globals().update({k: getattr(trt, k) for k in dir(trt)})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sdk.SDK, "rtx", property(lambda self: True))
    folder = tmp_path / "engine"
    folder.mkdir()
    plain = without_plugin(source.path, tmp_path)
    request = Request(plain, SHAPES, "net", compute_capabilities=["8.9"], timeout=300)
    with pytest.raises(ConversionError) as told:
        build_engine(sdk.SDK("limited_rtx", "1"), request, folder / "net.engine")
    assert told.value.exit_code == 3
    words = str(told.value).lower()
    assert "memory" in words or "bad_alloc" in words or "signal" in words, words
    assert not (folder / "net.engine").exists()


def attentions(width: int = 16) -> SimpleNamespace:
    shape = ("batch", 12, 2, width)
    site = SimpleNamespace(op="FlowAttention", q_shape=shape, k_shape=shape, v_shape=shape)
    return SimpleNamespace(attentions=(site,), model="net")


def settings(**extra: object) -> TensorRTOptions:
    return TensorRTOptions.parse(Options(extra=extra))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOWEXPORT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernel_build, "packaged_toolkits", list)


def test_without_a_gpu_the_plugin_needs_no_compiler(no_compiler: None) -> None:
    assert convert.decide(attentions(), settings(), None).plugin  # type: ignore[arg-type]


def test_a_gpu_without_a_kernel_gets_the_decomposed_engine(no_compiler: None) -> None:
    found = convert.decide(attentions(), settings(), "89")  # type: ignore[arg-type]
    assert not found.plugin and "no nvcc" in found.reason
    assert found.fix and "flowexport[kernel]" in found.fix and "--no-plugin" in found.fix
    with pytest.raises(UnavailableError, match="the GPU here needs the plugin's kernel") as told:
        convert.decide(attentions(), settings(plugin=True), "89")  # type: ignore[arg-type]
    assert told.value.exit_code == 5


def test_a_cached_kernel_is_enough(
    no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kernel_build.cache_dir()
    folder.mkdir(parents=True)
    stem, tail = "flow_attention-sm", f"-{kernel_build.source_hash()[:16]}.so"
    for held in ("75", "80_86", "90_120"):
        (folder / f"{stem}{held}{tail}").touch()
    (folder / f"{stem}89-0000000000000000.so").touch()
    for capability, held in (
        ("75", "75"), ("80", "80_86"), ("86", "80_86"), ("89", "80_86"), ("90", "90_120"),
        ("100", "80_86"), ("121", "90_120"),
    ):  # fmt: skip
        found = kernel_build.cached_cuda(capability)
        assert found and found.name == f"{stem}{held}{tail}", capability
        assert convert.decide(attentions(), settings(), capability).plugin  # type: ignore[arg-type]
    assert kernel_build.cached_cuda("70") is None


def test_plugin_switched_off_and_too_wide() -> None:
    off = convert.decide(attentions(), settings(plugin=False), None)  # type: ignore[arg-type]
    assert not off.plugin and "--no-plugin" in off.reason and off.fix is None
    wide = convert.decide(attentions(160), settings(), None)  # type: ignore[arg-type]
    assert not wide.plugin and "width 160" in wide.reason and wide.fix == "--no-plugin"
    with pytest.raises(InputError, match="width 160"):
        convert.decide(attentions(160), settings(plugin=True), None)  # type: ignore[arg-type]
    assert too_wide([("b", 3, 2, "d")], 128) and too_wide([("b", 3, 2, 128)], 128) is None


def test_plan_switches_the_plugin_off() -> None:
    from flowexport.plan import make_plan

    arguments = {"targets": ["onnx", "tensorrt"], "check": False, "out": "nowhere/at/all"}
    try:
        plan = make_plan("digits", plugin=False, **arguments)  # type: ignore[arg-type]
    except UnavailableError:
        pytest.skip("no TensorRT is installed")
    assert plan.options["tensorrt"].extra["plugin"] is False
    assert "plugin" not in plan.options["onnx"].extra
    usual = make_plan("digits", **arguments)  # type: ignore[arg-type]
    assert "plugin" not in usual.options["tensorrt"].extra


@needs_rtx
@pytest.mark.skipif("FLOWEXPORT_PLUGIN" not in os.environ, reason="FLOWEXPORT_PLUGIN is no library")
def test_the_built_cpp_library_is_in_the_engine(source: Artifact, tmp_path: Path) -> None:
    """With the library that CMake built from a real SDK's headers."""
    library = Path(os.environ["FLOWEXPORT_PLUGIN"])
    built = build(source.path, tmp_path / "a", Plugin(2, library, embed=True))
    assert len(built.plugin_layers) == 2
    assert library.read_bytes() in built.engine.read_bytes()
    lean = build(source.path, tmp_path / "b", Plugin(2, library))
    assert len(lean.plugin_layers) == 2
    assert lean.engine.stat().st_size < built.engine.stat().st_size - library.stat().st_size / 2


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.INT8_WEIGHTS])
def test_quantised_layers_around_the_plugin(
    precision: Precision, model: Any, tmp_path: Path
) -> None:
    from flowexport.calibration import write_samples

    samples = tmp_path / "calibration.safetensors"
    labels = np.arange(8) % programs.CLASSES
    write_samples(Dataset("eight", {"x": programs.sample(8)}, labels, ("a",) * 4, "us"), samples)
    extra = {"check_rebuild": False, "compute_capabilities": ["8.9"]}
    options = Options(precision, extra, calibration=samples)
    engine = TARGET.convert(programs.program(model, "net"), options, tmp_path)
    assert engine.precision is precision and engine.fusions == {"FlowAttention": 2}
    found = {one["path"]: one["found"] for one in engine.details["quantisation"]["layers"]}
    static = precision is Precision.INT8_STATIC
    assert found["two.qkv"] == ("integer" if static else "weights")
    # The activations of that layer, and of no other, are rounded in the engine.
    names = [layer["name"] for layer in engine.details["layers"]]
    assert sum("Roun" in name for name in names) == (1 if static else 0)


@needs_rtx
@pytest.mark.slow
def test_a_machine_with_a_gpu_and_no_compiler_converts_and_says_what_mends_it(
    no_compiler: None, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "gpu_capability", lambda: "89")
    extra = {"check_rebuild": False, "compute_capabilities": ["8.9"]}
    out = tmp_path / "out"
    out.mkdir()
    engine = TARGET.convert(programs.program(model, "net"), Options(extra=extra), out)
    assert engine.form.startswith("decomposed: ") and engine.fusions == {"FlowAttention": 0}
    (warning,) = engine.details["warnings"]
    assert "no nvcc" in warning and "pip install 'flowexport[kernel]'" in warning
    assert not engine.details["plugin"]["used"] and "no nvcc" in engine.details["plugin"]["reason"]
    insists = Options(extra={**extra, "plugin": True})
    with pytest.raises(UnavailableError, match="the GPU here needs the plugin's kernel"):
        TARGET.convert(programs.program(model, "net"), insists, tmp_path)
