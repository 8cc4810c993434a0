"""The Python TensorRT plugin: built into engines without a GPU, run through the host kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from flowexport.core.errors import InputError, UnavailableError
from flowexport.core.types import Options, Precision, TensorSpec
from flowexport.lowering import lower
from flowexport.ops.flow_attention.lowered import DESCRIPTOR, attributes
from flowexport.ops.flow_attention.op import flow_attention, op_arguments
from flowexport.ops.flow_attention.reference import flow_attention_reference
from flowexport.ops.flow_attention.tensorrt.build import build_host, source_hash
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary, problem
from flowexport.ops.flow_attention.tensorrt.plugin_fields import (
    Kernels,
    check_shapes,
    find_kernel,
    parse_fields,
)
from flowexport.ops.flow_attention.tensorrt.rtx import builder_environment
from flowexport.ops.flow_attention.tensorrt.workspace import workspace_bytes
from flowexport.ops.flow_attention.variant import VARIANTS, FlowVariant

NAMES = ("vision", "timeseries", "causal", "mobile", "lra")

# The process that builds: TensorRT may end it, keeps one logger, and reads LD_LIBRARY_PATH once.
BUILD = """
import json, sys
from pathlib import Path
import tensorrt_rtx as trt
from flowexport.ops.flow_attention.tensorrt.plugin import register_plugin, require_plugins

request = json.loads(sys.argv[1])
logger = trt.Logger(trt.Logger.VERBOSE)
kernels = None
if request["plugin"]:
    library = Path(request["library"]) if request["library"] else None
    kernels = register_plugin(trt, library=library, embed=library is not None)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
result = {"parsed": parser.parse(Path(request["onnx"]).read_bytes())}
types = [str(network.get_layer(i).type) for i in range(network.num_layers)]
result["plugins"] = types.count("LayerType.PLUGIN_V3")
try:
    require_plugins(trt, network, request["expected"], "convert tensorrt tiny")
    result["refused"] = None
except Exception as error:
    result["refused"] = str(error)
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM80, 0)
profile = builder.create_optimization_profile()
tail = request["tail"]
profile.set_shape("x", (1, *tail), (2, *tail), (4, *tail))
config.add_optimization_profile(profile)
if result["parsed"] and not request["parse_only"]:
    engine = builder.build_serialized_network(network, config)
    result["engine"] = engine is not None
    if engine is not None:
        Path(request["engine"]).write_bytes(engine)
if kernels:
    result["failures"] = kernels.failures
    result["created"] = {n: repr(v) for n, v in kernels.created.items()}
Path(request["result"]).write_text(json.dumps(result))
"""


class Tiny(nn.Module):
    """One projection, then an attention of each variant."""

    def __init__(self, names: tuple[str, ...], heads: int = 4) -> None:
        super().__init__()
        self.names, self.heads = names, heads
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        for name, qkv in zip(self.names, self.qkv, strict=True):
            q, k, v = qkv(x).reshape(b, n, 3, self.heads, c // self.heads).unbind(2)
            x = x + flow_attention(q, k, v, VARIANTS[name]).reshape(b, n, c)
        return x


def export(folder: Path, names: tuple[str, ...], precision: Precision = Precision.FP32) -> Path:
    pytest.importorskip("onnx")
    from flowexport.targets.onnx import TARGET

    torch.manual_seed(0)
    program = lower(
        Tiny(names).eval(),
        (TensorSpec("x", ("batch", 24, 32)),),
        ("y",),
        name="tiny",
        ops=(DESCRIPTOR,),
        precision=precision,
    )
    return TARGET.convert(program, Options(precision, {}), folder).path


def build(folder: Path, onnx: Path, expected: int, **request: object) -> tuple[dict, str]:
    pytest.importorskip("tensorrt_rtx")
    folder.mkdir(exist_ok=True)
    request = {
        "onnx": str(onnx),
        "expected": expected,
        "plugin": True,
        "library": "",
        "parse_only": False,
        "tail": [24, 32],
        "engine": str(folder / "x.engine"),
        "result": str(folder / "result.json"),
        **request,
    }
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(request)],
        env=builder_environment("tensorrt_rtx", folder / "shim"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(str(request["result"])).read_text()), done.stdout + done.stderr


def custom_layers(log: str) -> int:
    return sum(line.startswith("Name: ") and "custom_layer" in line for line in log.splitlines())


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return export(tmp_path_factory.mktemp("onnx"), NAMES)


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory, onnx_file):
    folder = tmp_path_factory.mktemp("plugin")
    return (*build(folder, onnx_file, len(NAMES)), folder / "x.engine")


def test_every_node_is_a_plugin_layer_of_the_engine(with_plugin):
    result, log, engine = with_plugin
    assert result["failures"] == []
    assert result["refused"] is None
    assert result["plugins"] == len(NAMES)
    assert result["engine"]
    assert custom_layers(log) == len(NAMES)
    blob = engine.read_bytes()
    # TensorRT-RTX writes each plugin's fields twice. Every one must be there in full.
    times = blob.count(source_hash().encode()) // len(NAMES)
    assert times >= 1
    assert blob.count(source_hash().encode()) == times * len(NAMES)
    clamped = [VARIANTS[n] for n in NAMES if VARIANTS[n].clamp]
    assert blob.count(np.array([-1, 1], np.float32).tobytes()) == times * len(clamped)
    assert blob.count(np.array([1e-6], np.float32).tobytes()) >= times * len(NAMES)
    assert blob.count(b"competition_axis") == times * len(NAMES)


def test_nodes_keep_their_variants(with_plugin):
    result, _, _ = with_plugin
    assert sorted(result["created"].values()) == sorted(
        repr(FlowVariant(**{**v.__dict__, "eps": float(np.float32(v.eps)), **outer(v)}))
        for v in (VARIANTS[n] for n in NAMES)
    )


def outer(v: FlowVariant) -> dict[str, float]:
    return {"outer_eps": float(np.float32(v.outer_eps))}  # attributes of ONNX are float32


def test_without_the_plugin_the_functions_are_inlined(tmp_path, onnx_file):
    result, log = build(tmp_path, onnx_file, len(NAMES), plugin=False)
    assert result["parsed"]
    assert result["plugins"] == 0
    assert "expected 5" in result["refused"]
    assert "no plugin is registered" in result["refused"]
    assert custom_layers(log) == 0
    assert "kgen" in log


def test_an_unknown_plugin_version_is_not_inlined_silently(tmp_path, onnx_file):
    import onnx

    model = onnx.load(onnx_file)
    changed = [n for n in model.graph.node if n.op_type == "FlowAttention"][:1]
    for node in changed:
        (version,) = (a for a in node.attribute if a.name == "plugin_version")
        version.s = b"2"
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    result, _ = build(tmp_path, path, len(NAMES), parse_only=True)
    assert result["plugins"] == len(NAMES) - 1
    assert "has 4 FlowAttention plugin layers; expected 5" in result["refused"]
    assert "plugin_version='1'" in result["refused"]


def test_an_unknown_attribute_value_says_so(tmp_path, onnx_file):
    import onnx

    model = onnx.load(onnx_file)
    node = next(n for n in model.graph.node if n.op_type == "FlowAttention")
    next(a for a in node.attribute if a.name == "feature_map").s = b"cosine"
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    result, _ = build(tmp_path, path, len(NAMES), parse_only=True)
    assert any("'cosine'" in failure for failure in result["failures"])
    assert not result["parsed"] or "'cosine'" in result["refused"]


@pytest.mark.slow
def test_float16_and_an_embedded_library(tmp_path):
    path = export(tmp_path, NAMES, Precision.FP16)
    library = tmp_path / "library.so"
    library.write_bytes(np.random.default_rng(0).bytes(50_000))
    result, log = build(tmp_path, path, len(NAMES), library=str(library))
    assert result["engine"]
    assert custom_layers(log) == len(NAMES)
    # Once for all plugins, and once more as TensorRT-RTX writes fields twice.
    assert (tmp_path / "x.engine").read_bytes().count(library.read_bytes()) in (1, 2)


def test_runs_through_its_own_enqueue(tmp_path):
    """The plugin's whole runtime side on the host kernel: fields, shapes, workspace, launch."""
    trt = pytest.importorskip("tensorrt_rtx")
    try:
        kernels = Kernels(library=build_host())
    except UnavailableError as error:
        pytest.skip(str(error))
    from flowexport.ops.flow_attention.tensorrt.plugin import _creator_class

    creator = _creator_class(trt)(kernels)
    for name, dtype in product(NAMES, (torch.float32, torch.float16, torch.bfloat16)):
        data = {k: field_of(trt, v) for k, v in attributes(op_arguments(VARIANTS[name])).items()}
        fields = [trt.PluginField(k, *v) for k, v in data.items()]
        made = creator.create_plugin(
            "n", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD
        )
        loaded = creator.create_plugin(
            "n", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME
        )
        assert loaded.variant == made.variant
        assert attributes(op_arguments(made.variant)).keys() == data.keys()
        assert loaded.source == source_hash()
        shape = (2, 70, 3, 20)
        q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
        out = torch.full(shape, float("nan"), dtype=dtype)
        kind = getattr(trt, str(dtype).removeprefix("torch."))
        desc = [SimpleNamespace(dims=shape, type=kind) for _ in range(3)]
        size = loaded.get_workspace_size(
            [SimpleNamespace(min=shape, max=(4, 90, 3, 20)) for _ in range(3)], []
        )
        memory = torch.empty(size + 256, dtype=torch.uint8)
        plugin = loaded.clone()
        plugin.on_shape_change(desc, desc[:1])
        plugin.enqueue(
            desc,
            desc[:1],
            [x.data_ptr() for x in (q, k, v)],
            [out.data_ptr()],
            memory.data_ptr() + -memory.data_ptr() % 256,
            0,
        )
        truth = flow_attention_reference(q.double(), k.double(), v.double(), VARIANTS[name])
        error = float((out.double() - truth).abs().max() / truth.abs().max())
        assert error <= {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]


def field_of(trt, value):
    if isinstance(value, str):
        return value.encode(), trt.PluginFieldType.CHAR
    if isinstance(value, int):
        return np.array([value], np.int32), trt.PluginFieldType.INT32
    return np.atleast_1d(np.array(value, np.float32)), trt.PluginFieldType.FLOAT32


def test_profiles_and_shapes_that_do_not_fit():
    trt = pytest.importorskip("tensorrt_rtx")
    from flowexport.ops.flow_attention.tensorrt.plugin import _plugin_class

    def plugin(variant: FlowVariant):
        return _plugin_class(trt)(variant, Kernels(), "0" * 64, b"")

    def dynamic(*shapes):
        return [SimpleNamespace(min=s, max=s, desc=SimpleNamespace(dims=s)) for s in shapes]

    good = (1, 10, 2, 8)
    plugin(VARIANTS["standard"]).configure_plugin(dynamic(good, good, good), [])
    one = plugin(VARIANTS["causal"])
    with pytest.raises(InputError, match="q has 9 tokens and k 10"):
        one.configure_plugin(dynamic((1, 9, 2, 8), good, good), [])
    assert "q has 9 tokens" in one.kernels.failures[0]
    for shapes, part in (
        (((1, 10, 2, 129), (1, 10, 2, 129), good), "width is 129"),
        (((1, 10, 2, -1), (1, 10, 2, -1), good), "width is -1"),
        ((good, (1, 10, 3, 8), good), "heads"),
        ((good, good, (1, 11, 2, 8)), "source tokens"),
        ((good, (2, 10, 2, 8), good), "batch"),
        ((good, good, (10, 2, 8)), "4 dimensions"),
    ):
        with pytest.raises(InputError, match=part):
            check_shapes(shapes)
    check_shapes([(-1, -1, 2, 8), (-1, 10, 2, 8), (3, -1, 2, 16)])
    linear, other = trt.TensorFormat.LINEAR, trt.TensorFormat.CHW32

    def tensors(*pairs):
        return [SimpleNamespace(desc=SimpleNamespace(type=t, format=f)) for t, f in pairs]

    half = tensors(*[(trt.float16, linear)] * 4)
    assert all(plugin(VARIANTS["vision"]).supports_format_combination(i, half, 3) for i in range(4))
    mixed = tensors((trt.float16, linear), (trt.float32, linear))
    assert not plugin(VARIANTS["vision"]).supports_format_combination(1, mixed, 3)
    for bad in ((trt.int8, linear), (trt.float32, other)):
        assert not plugin(VARIANTS["vision"]).supports_format_combination(0, tensors(bad), 3)


def test_fields_are_validated():
    assert parse_fields({}) == FlowVariant(clamp=None)
    assert parse_fields({"clamp": np.array([-5, 5])}).clamp == (-5.0, 5.0)
    assert parse_fields({"feature_map": b"relu\0", "causal": np.array([0])}).feature_map == "relu"
    with pytest.raises(InputError, match="clamp has 3 values"):
        parse_fields({"clamp": np.zeros(3)})
    with pytest.raises(InputError, match="flow axis is 'rows'"):
        parse_fields({"flow_axis": b"rows"})


def test_workspace_without_a_compiled_kernel_is_the_kernels_own():
    try:
        library = KernelLibrary(build_host())
    except UnavailableError as error:
        pytest.skip(str(error))
    for variant in VARIANTS.values():
        for b, n, h, d, m in (
            (1, 1, 1, 1, 1),
            (3, 700, 12, 8, 16),
            (64, 49, 12, 64, 64),
            (8, 65536, 8, 128, 3),
        ):
            for splits in (0, 5):
                p = problem((b, n, h, d), (b, n, h, d), (b, n, h, m), "float16", variant, splits)
                assert workspace_bytes(p) == library.workspace(p)


def test_kernel_of_another_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWEXPORT_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match="kernel source 1111111111111111"):
        find_kernel("1" * 64, Kernels())
    # Code from an engine does not run unless it is allowed to.
    with pytest.raises(UnavailableError, match="kernel source"):
        find_kernel("1" * 64, Kernels(embedded=b"code"))
    with pytest.raises(UnavailableError, match="cannot be loaded"):
        find_kernel("1" * 64, Kernels(embedded=b"code", allow_embedded=True))
