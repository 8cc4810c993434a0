"""The session on a double of a GPU and of TensorRT's runtime: nothing here has run on a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorrt_fakes import COPY_MS, ENGINE_MS, FakeDevice, FakeEngine, runtime_module

from flowexport.bench import measure
from flowexport.core.errors import BundleError, InputError, UnavailableError, VerificationError
from flowexport.core.hashing import sha256_file
from flowexport.core.reports import Tolerance
from flowexport.core.types import Artifact, Dataset, Precision, TensorSpec, Verdict
from flowexport.ops.flow_attention.tensorrt import plugin, plugin_fields
from flowexport.parity import Evaluation, Golden, verify_artifact
from flowexport.targets.tensorrt import device as devices
from flowexport.targets.tensorrt.sdk import SDK
from flowexport.targets.tensorrt.session import ALLOW, MOST_SHAPES, TensorRTSession

PROFILES = [((1, 3), (2, 3), (4, 3)), ((5, 3), (8, 3), (16, 3))]


def compute(x: np.ndarray) -> np.ndarray:
    return np.stack([x.sum(axis=1), x.max(axis=1)], axis=1)


class Bench:
    """A session with everything around it."""

    def __init__(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        refuses: bool = False,
        capturable: bool = True,
        **details: Any,
    ) -> None:
        self.device = FakeDevice(capturable=capturable)
        self.engine = FakeEngine(self.device, compute, PROFILES, lambda shapes: (shapes["x"][0], 2))
        self.module = runtime_module(None if refuses else self.engine)
        monkeypatch.setattr(SDK, "load", lambda sdk: self.module)
        path = tmp_path / "net.engine"
        path.write_bytes(b"engine")
        self.artifact = Artifact(
            "tensorrt", path, "", 6, Precision.FP32, "net", "", "",
            (TensorSpec("x", ("batch", 3)),), (TensorSpec("logits", ("batch", 2)),),
            details={"compute_capabilities": ["8.6"], "builder": "TensorRT 10", **details},
        )  # fmt: skip

    def open(self) -> TensorRTSession:
        return TensorRTSession(self.artifact, SDK("tensorrt", "10"), self.device)  # type: ignore[arg-type]


def sample(batch: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(batch).standard_normal((batch, 3))
    return {"x": values.astype(np.float32)}


def test_runs_in_both_profiles_with_buffers_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open() as session:
        made = list(bench.device.allocated)
        # The largest profile: 16 rows of 3 and of 2 floats.
        assert made == [16 * 3 * 4, 16 * 2 * 4]
        for batch in (1, 4, 5, 16, 1, 4):
            feeds = sample(batch)
            result = session.run(feeds)["logits"]
            np.testing.assert_allclose(result, compute(feeds["x"]), rtol=1e-6)
        assert bench.device.allocated == made
        # One graph a shape; every result came from a replay.
        assert bench.device.captures == 4 and bench.device.replays == 6
        assert session.info.details["cuda_graph"] is True


def test_times_are_the_devices_and_transfers_stand_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open() as session:
        assert session.info.details["cuda_events_ms"] is None
        session.run(sample(2))  # it prepares: its time is not counted
        for _ in range(3):
            session.run(sample(2))
        info = session.info
        times = info.details["cuda_events_ms"]
        assert times["runs"] == 3
        assert times["engine"] == {"p10": ENGINE_MS, "p50": ENGINE_MS, "p90": ENGINE_MS}
        assert times["host_to_device"]["p50"] == times["device_to_host"]["p50"] == COPY_MS
        assert info.details["gpu_state"] == {"clock_sm_mhz": 1980, "temperature_c": 45}
        assert info.label == "TensorRT 10.9.0" and info.details["gpu"] == "Fake GPU"


def test_a_measurement_keeps_the_gpus_own_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(tmp_path, monkeypatch).open() as session:
        found = measure({"tensorrt": session}, sample(1), warmup=2, min_runs=5, min_seconds=0)
    kept = json.loads(json.dumps(found["tensorrt"].to_json()))["runtime_info"]["details"]
    assert kept["cuda_events_ms"]["engine"]["p50"] == ENGINE_MS
    assert kept["cuda_events_ms"]["runs"] == 6  # all but the one that prepared
    assert kept["gpu_state"]["temperature_c"] == 45


def test_without_graphs_it_launches_plainly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, capturable=False)
    with bench.open() as session:
        for batch in (3, 5, 3):
            feeds = sample(batch)
            np.testing.assert_allclose(session.run(feeds)["logits"], compute(feeds["x"]), rtol=1e-6)
        assert "not permitted" in session.info.details["cuda_graph"]
        assert bench.device.replays == 0


def test_many_shapes_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open() as session:
        for batch in (*range(1, 9), 1):
            feeds = sample(batch)
            np.testing.assert_allclose(session.run(feeds)["logits"], compute(feeds["x"]), rtol=1e-6)
        assert len(session._ready) == MOST_SHAPES


def test_input_outside_every_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open() as session:
        with pytest.raises(InputError, match="17x3; expected x 1x3 to 4x3; x 5x3 to 16x3") as told:
            session.run(sample(17))
        assert "targets.tensorrt.profiles" in str(told.value) and told.value.exit_code == 2
        session.run(sample(16))  # and it goes on


def test_engine_of_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, refuses=True)
    with pytest.raises(BundleError) as told:
        bench.open()
    assert "Fake GPU (compute capability 8.9) refuses net.engine" in str(told.value)
    assert "for compute capability 8.6" in str(told.value)
    assert told.value.exit_code == 2


def test_engine_that_fails_or_finds_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open() as session:
        bench.engine.breaks = True
        with pytest.raises(VerificationError, match="the engine failed"):
            session.run(sample(1))
    bench.engine.memory = False
    with pytest.raises(UnavailableError, match="no memory for the engine's profile 0"):
        bench.open()


@pytest.mark.parametrize(
    "details", [{"version_compatible": True}, {"plugin": {"used": False, "embedded": True}}]
)
def test_code_in_an_engine_runs_only_when_allowed(
    details: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOW, raising=False)
    bench = Bench(tmp_path, monkeypatch, **details)
    with pytest.raises(UnavailableError, match=f"native code.*{ALLOW}=1"):
        bench.open()
    monkeypatch.setenv(ALLOW, "1")
    with bench.open() as session:
        assert session._runtime.engine_host_code_allowed is True
        session.run(sample(1))


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, Verdict.PASS), (1.001, Verdict.FAIL)])
def test_verified_like_every_other_target(
    scale: float, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    bench.engine.compute = lambda x: compute(x) * scale
    cases = {"random-0": sample(1), "batch-3": sample(3), "sixteen": sample(16)}
    expected = {k: {"logits": compute(v["x"].astype(np.float64))} for k, v in cases.items()}
    scores = sample(40)["x"]  # more than the largest profile takes
    evaluation = Evaluation(
        Dataset("forty", {"x": scores}, np.zeros(40, np.int64), ("a", "b"), "us"),
        "logits",
        compute(scores.astype(np.float64)),
        "",
    )
    target = SimpleNamespace(
        name="tensorrt",
        load=lambda artifact, threads=1: bench.open(),
        inspect=lambda path: {"fusions": {}},
    )
    artifact = replace(bench.artifact, sha256=sha256_file(bench.artifact.path))
    report = verify_artifact(
        target,  # type: ignore[arg-type]
        artifact,
        Golden(cases, expected, ""),
        evaluation,
        Tolerance(max_rel=1e-5, reason="the double computes in float32"),
    )
    assert report.verdict is verdict, report.reason
    assert len(report.cases) >= 4
    assert bench.device.captures >= 3


PLUGIN = {"used": True, "creator": "python", "embedded": False, "kernel_source_sha256": "a" * 64}


def test_plugin_is_registered_with_its_kernel_before_the_engine_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, plugin=PLUGIN)
    order: list[str] = []

    def register(trt: Any, *, capability: str) -> plugin_fields.Kernels:
        order.append(f"register {capability}")
        return plugin_fields.Kernels(capability=capability)

    def find(wanted: str, kernels: plugin_fields.Kernels) -> Any:
        order.append(f"kernel {wanted[:4]}")
        return type("Library", (), {"path": Path("kernel.so")})

    def read(self: Any, data: bytes) -> FakeEngine:
        order.append("read")
        return bench.engine

    monkeypatch.setattr(plugin, "register_plugin", register)
    monkeypatch.setattr(plugin_fields, "find_kernel", find)
    monkeypatch.setattr(bench.module.Runtime, "deserialize_cuda_engine", read)
    with bench.open() as session:
        assert session._plugin.library == Path("kernel.so")
    assert order == ["register 89", "kernel aaaa", "read"]


def test_plugin_without_a_kernel_names_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, plugin=PLUGIN)
    monkeypatch.setattr(plugin, "register_plugin", lambda *a, **k: plugin_fields.Kernels())
    monkeypatch.setenv("FLOWEXPORT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UnavailableError, match=r"kernel cannot be had.*--no-plugin") as told:
        bench.open()
    assert told.value.exit_code == 5


def test_cpp_library_that_tensorrt_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, plugin={**PLUGIN, "creator": "c++"})
    library = tmp_path / "plugin.so"
    library.write_text("no library")
    bench.artifact = replace(bench.artifact, options={"plugin_library": str(library)})
    registry = type("Registry", (), {"load_library": lambda self, path: None})()
    bench.module.get_plugin_registry = lambda: registry
    with pytest.raises(UnavailableError, match=r"refuses the plugin library .*plugin\.so.*CMake"):
        bench.open()


def test_gpu_state_without_nvml_says_why() -> None:
    pytest.importorskip("pynvml")
    found = devices.nvml_state("GPU-00000000-0000-0000-0000-000000000000")
    assert set(found) == {"not_known"} or found["temperature_c"] > 0
    if "not_known" in found:
        assert found["not_known"].startswith("NVML: ")
