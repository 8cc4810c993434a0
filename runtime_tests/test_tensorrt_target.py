"""The TensorRT target: real engines without a GPU, its builder's failures, what it refuses."""

from __future__ import annotations

import ctypes
from pathlib import Path

import onnx
import onnx_programs as programs
import pytest

from flowexport.core.errors import ConversionError, FlowExportError, InputError, UnavailableError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Options, Precision
from flowexport.ops.flow_attention import causal
from flowexport.ops.flow_attention.tensorrt.build import source_hash
from flowexport.targets.tensorrt import TARGET, sdk
from flowexport.targets.tensorrt.build import ADDR_NO_RANDOMIZE
from flowexport.targets.tensorrt.builder import Request, build_engine, parse_layers
from flowexport.targets.tensorrt.convert import sidecar_path

needs_rtx = pytest.mark.skipif(
    sdk.installed("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed (pip install 'flowexport[tensorrt]')",
)
without_gpu = pytest.mark.skipif(sdk.driver_problem() is None, reason="this machine has a GPU")

CAPABILITIES = ["8.6", "8.9"]


def addresses_can_be_fixed() -> bool:
    """Whether this machine lets a process switch address randomisation off."""
    personality = ctypes.CDLL(None).personality
    before = personality(0xFFFFFFFF)
    allowed = before != -1 and personality(before | ADDR_NO_RANDOMIZE) != -1
    return allowed and personality(before) != -1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("engine")
    lowered = programs.program(programs.net("vision"), "net")
    profiles = [{"batch": [1, 2, 4]}, {"batch": [5, 8, 16]}]
    options = Options(extra={"compute_capabilities": CAPABILITIES, "profiles": profiles})
    return TARGET.convert(lowered, options, folder)


@needs_rtx
def test_engine_and_what_is_recorded(engine: Artifact) -> None:
    assert engine.path.read_bytes()[1:4] == b"trt"
    assert engine.size_bytes == engine.path.stat().st_size > 10_000
    assert engine.sha256 == sha256_file(engine.path)
    assert engine.fusions == {"FlowAttention": 2}
    assert engine.form == "plugin flowexport::FlowAttention 1"
    details = engine.details
    assert details["builder"].startswith("TensorRT-RTX 1.")
    assert details["compute_capabilities"] == CAPABILITIES
    width = programs.WIDTH
    assert details["profiles"] == [
        {"x": [[batch, programs.LENGTH, width] for batch in sizes]}
        for sizes in ((1, 2, 4), (5, 8, 16))
    ]
    assert details["layer_count"] == len(details["layers"]) == sum(details["layer_types"].values())
    # One engine layer an attention, in each of the two profiles.
    assert details["layer_tables"] == 2
    assert details["layer_types"]["custom_layer"] == 4
    plugin = details["plugin"]
    assert [details["layers"][i]["type"] for i in plugin["layers"]] == ["custom_layer"] * 4
    assert plugin["creator"] == "python" and plugin["kernel_source_sha256"] == source_hash()
    blob = engine.path.read_bytes()
    assert len(plugin["byte_offsets"]) >= 2
    assert all(blob[at:].startswith(b"competition_axis") for at in plugin["byte_offsets"])
    assert source_hash().encode() in blob
    assert all(layer["name"] and layer["type"] for layer in details["layers"])
    if addresses_can_be_fixed():
        assert details["deterministic"] is True and details["deterministic_reason"] is None
    assert sorted(p.name for p in engine.path.parent.iterdir()) == ["net.engine", "net.layers.json"]


@needs_rtx
def test_fp16_engine_is_half_inside(engine: Artifact, tmp_path: Path) -> None:
    lowered = programs.program(programs.net("vision"), "net", Precision.FP16)
    options = Options(Precision.FP16, {"check_rebuild": False})
    half = TARGET.convert(lowered, options, tmp_path)
    assert half.precision is Precision.FP16 and half.sha256 != engine.sha256
    assert half.details["deterministic"] is None and "check_rebuild" in str(
        half.details["deterministic_reason"]
    )
    assert {s.dtype for s in (*half.inputs, *half.outputs)} == {"float32"}
    assert half.fusions == {"FlowAttention": 2}


@needs_rtx
def test_bring_your_own_module(tmp_path: Path) -> None:
    lowered = programs.program(programs.Plain().eval(), "own", shape=("batch", 3, 10))
    artifact = TARGET.convert(lowered, Options(extra={"check_rebuild": False}), tmp_path)
    assert artifact.fusions == {} and artifact.details["layer_count"] > 0


@needs_rtx
def test_inspect_reads_the_layer_table(engine: Artifact, tmp_path: Path) -> None:
    found = TARGET.inspect(engine.path)
    assert found["operators"] == engine.details["layer_types"]
    assert found["fusions"] == {"FlowAttention": 2}
    assert found["inputs"] == [s.to_json() for s in engine.inputs]
    assert found["size_bytes"] == engine.size_bytes
    copy = tmp_path / "net.engine"
    copy.write_bytes(engine.path.read_bytes())
    with pytest.raises(InputError, match=r"net\.layers\.json"):
        TARGET.inspect(copy)
    sidecar_path(copy).write_text(sidecar_path(engine.path).read_text())
    assert TARGET.inspect(copy) == found
    copy.write_bytes(engine.path.read_bytes()[:-1])
    with pytest.raises(InputError, match="sha256"):
        TARGET.inspect(copy)
    sidecar_path(copy).write_text("[]")
    with pytest.raises(InputError, match="no layer table"):
        TARGET.inspect(copy)


@without_gpu
def test_without_a_gpu_nothing_runs_and_says_so() -> None:
    found = TARGET.probe()
    assert not found.runs and found.reason and found.fix
    assert found.converts == (sdk.installed("tensorrt_rtx") is not None)
    artifact = Artifact(
        "tensorrt", Path("net.engine"), "", 0, Precision.FP32, "net", "", "", (), (),
        toolchain={"tensorrt_rtx": "1"},
    )  # fmt: skip
    with pytest.raises(UnavailableError, match="NVIDIA"):
        TARGET.load(artifact)


def test_without_a_library_the_fix_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sdk, "installed", lambda module: None)
    found = TARGET.probe()
    assert not found.converts and not found.runs
    assert found.fix == "pip install 'flowexport[tensorrt]'"
    with pytest.raises(UnavailableError, match=r"flowexport\[tensorrt\]"):
        TARGET.convert(programs.program(programs.Plain().eval(), "own", shape=("batch", 3, 10)),
                       Options(), tmp_path)  # fmt: skip


def test_full_tensorrt_is_taken_where_it_can_build(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"tensorrt": sdk.SDK("tensorrt", "11"), "tensorrt_rtx": sdk.SDK("tensorrt_rtx", "1.7")}
    monkeypatch.setattr(sdk, "installed", both.get)
    for gpu, chosen in ((True, "tensorrt"), (False, "tensorrt_rtx")):
        found = sdk.find(gpu=gpu)
        assert found and found.module == chosen
    monkeypatch.setattr(sdk, "installed", {"tensorrt": both["tensorrt"]}.get)
    monkeypatch.setattr(sdk, "driver_problem", lambda: "there is no NVIDIA driver")
    assert not TARGET.probe().converts, "full TensorRT does not build without a GPU"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"profiles": {"batch": [1, 8]}}, "min <= opt <= max"),
        ({"profiles": [{"batch": [1, 1, 8]}, {"batch": [4, 2, 8]}]}, "min <= opt <= max"),
        ({"profiles": {"batch": [0, 1, 8]}}, "1 <= min"),
        ({"profiles": [1, 1, 8]}, "dimension names"),
        ({"profiles": []}, "dimension names"),
        ({"plugin": "yes"}, "plugin is 'yes'"),
        ({"plugin_library": "/nowhere/plugin.so"}, "CMake"),
        ({"embed_library": True}, "no plugin_library"),
        ({"plugin": False, "plugin_library": __file__}, "one of the two"),
        ({"hardware_compatibility": "ampere"}, "ampere_plus"),
        ({"timing_cache": "/nowhere/cache"}, "folder that exists"),
        ({"refit": 1}, "refit is 1; expected true or false"),
        ({"compute_capabilities": ["9.0"]}, "8.6, 8.9"),
        ({"compute_capabilities": []}, "8.6, 8.9, 12.0"),
        ({"timeout": -1}, "seconds"),
        ({"check_rebuild": "yes"}, "true or false"),
        ({"opset": 3}, "20, 21"),
        ({"form": "nope"}, "published"),
        ({"batch": 3}, "profiles"),
    ],
)
def test_unsupported_option_is_refused(extra: dict[str, object], named: str) -> None:
    with pytest.raises(FlowExportError, match=named) as caught:
        TARGET.validate(Options(extra=extra))
    assert caught.value.exit_code == 2


def test_dynamic_length_needs_a_range(tmp_path: Path) -> None:
    shape = ("batch", "time", programs.WIDTH)
    lowered = programs.program(programs.net("vision"), "net", shape=shape)
    with pytest.raises(InputError, match=r"time: \[min, opt, max\]"):
        TARGET.convert(lowered, Options(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def fake_sdk(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> sdk.SDK:
    (folder / "broken_tensorrt.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return sdk.SDK("broken_tensorrt", "0")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "import os, sys; print('terminate called', file=sys.stderr, flush=True); os.abort()",
            "SIGABRT.*terminate called",
        ),
        ("import os; os._exit(3)", "code 3"),
        ("import os; os.kill(os.getpid(), 9)", r"SIGKILL \(often: out of memory\)"),
        ("raise MemoryError", "ran out of memory.*Fix: give the build more memory"),
        ("import time; time.sleep(60)", "more than 3 s"),
        ("raise ImportError('libnvinfer.so.10 is missing')", "libnvinfer.so.10 is missing"),
    ],
)
def test_builder_that_ends_is_reported(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake_sdk(tmp_path, monkeypatch, source)
    with pytest.raises(ConversionError, match=said):
        build_engine(
            library,
            Request(tmp_path / "net.onnx", [], "net", compute_capabilities=["8.6"], timeout=3),
            tmp_path / "net.engine",
        )
    assert not (tmp_path / "net.engine").exists()


@needs_rtx
def test_parser_and_builder_errors_are_told(tmp_path: Path) -> None:
    library = sdk.installed("tensorrt_rtx")
    assert library

    def build(model: onnx.ModelProto, **changes: object) -> None:
        onnx.save(model, tmp_path / "net.onnx")
        settings = {"profiles": [], "compute_capabilities": ["8.6"], "timeout": 60, **changes}
        request = Request(tmp_path / "net.onnx", model="net", **settings)  # type: ignore[arg-type]
        build_engine(library, request, tmp_path / "net.engine")

    def graph(op: str, batch: object) -> onnx.ModelProto:
        value = [onnx.helper.make_tensor_value_info(n, 1, [batch, 4]) for n in ("x", "y")]
        nodes = [onnx.helper.make_node(op, ["x"], ["y"], domain="" if op == "Relu" else "alien")]
        opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("alien", 1)]
        made = onnx.helper.make_graph(nodes, "g", value[:1], value[1:])
        return onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)

    with pytest.raises(ConversionError, match="parser refuses"):
        build(graph("Teleport", 2))
    with pytest.raises(ConversionError, match="profile"):
        build(graph("Relu", "batch"))
    good = {"x": [[1, 4], [1, 4], [8, 4]]}
    with pytest.raises(ConversionError, match="profile 1"):
        build(graph("Relu", "batch"), profiles=[good, {"x": [[4, 4], [1, 4], [8, 4]]}])
    build(graph("Relu", "batch"), profiles=[good])


def test_layer_table_is_read_off_the_log() -> None:
    log = (
        "[11/20/2026-20:01:37] [TRT] [V] Name: not in the table, LayerType: kgen, \n"
        "[11/20/2026-20:01:37] [TRT] [V] Layers:\n"
        "Name: Gemm_3+Gemm_2_myl0_2, LayerType: gemm, Inputs: [ { Name: x, LayerType: no } ]\n"
        "Name: a, b_myl0_3, LayerType: custom_layer, Inputs: []\n"
        "\n"
        "Name: after the table, LayerType: kgen, \n"
    )
    found = [layer.to_json() for layer in parse_layers(log)]
    assert found == [
        {"name": "Gemm_3+Gemm_2_myl0_2", "type": "gemm"},
        {"name": "a, b_myl0_3", "type": "custom_layer"},
    ]
    assert parse_layers("[11/20/2026-20:01:37] [TRT] [E] nothing built\n") == ()


@needs_rtx
def test_two_variants_keep_their_own_bodies(tmp_path: Path) -> None:
    """Without inlining TensorRT would give the second node the first one's function."""
    lowered = programs.program(programs.net("vision", "lra"), "mixed")
    options = Options(extra={"check_rebuild": False, "form": "published", "plugin": False})
    mixed = TARGET.convert(lowered, options, tmp_path)
    names = " ".join(layer["name"] for layer in mixed.details["layers"])
    assert mixed.form == "decomposed: published"
    assert "custom_layer" not in mixed.details["layer_types"]
    off = {"used": False, "reason": "switched off (--no-plugin)", "fix": None}
    assert mixed.details["plugin"] == off and "warnings" not in mixed.details, "it was asked for"
    # φ of the second attention is relu, of its q and its k; the first has none.
    assert names.count("Relu") == 2
    assert mixed.fusions == {"FlowAttention": 0}


@needs_rtx
def test_a_long_causal_sequence_has_no_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX 1.7 gives no engine for this model's Scan."""
    monkeypatch.setattr(causal, "SEGMENT", 1)
    module = programs.Attend("causal", 2).eval()
    lowered = programs.program(module, "long", shape=(1, 100, programs.WIDTH))
    extra = {"check_rebuild": False, "form": "causal_scan", "plugin": False}
    options = Options(extra={**extra, "compute_capabilities": ["8.9"]})
    long = TARGET.convert(lowered, options, tmp_path)
    assert long.form == "decomposed: causal_scan"
    types = long.details["layer_types"]
    assert types["gemm"] > 0 and "cjmp" not in types, "a loop ends in a conditional jump"
