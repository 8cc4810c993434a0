"""Doubles of TensorRT's Python API and of a GPU, strict about the documented rules.

Work on the device happens when the stream is waited for, not before; an
engine runs only with every shape and address set and inside its profile. Every
name that a double has must exist in the real module (a test compares them).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

COPY_MS, ENGINE_MS = 1.0, 5.0


class FakeDevice:
    """A GPU whose stream does its work in ``wait``; each piece takes a known time."""

    name, cuda, capability, stream = "Fake GPU", "13.0", "89", 77

    def __init__(self, *, capturable: bool = True) -> None:
        self.queue: list[Callable[[], float]] = []
        self.clock, self.captures, self.replays, self.capturable = 0.0, 0, 0, capturable
        self.allocated: list[int] = []

    def memory(self, size: int) -> torch.Tensor:
        self.allocated.append(size)
        return torch.full((max(size, 1),), 0xAB, dtype=torch.uint8)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.full((max(size, 1),), 0xCD, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        def work() -> float:
            target.copy_(source)
            return COPY_MS

        self.queue.append(work)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert not self.queue, "other work is pending while a graph is captured"
        self.captures += 1
        call()
        graph, self.queue = self.queue, []

        def replay() -> None:
            self.replays += 1
            self.queue.extend(graph)

        return replay

    def mark(self) -> Any:
        event = SimpleNamespace(at=None)

        def work() -> float:
            event.at = self.clock
            return 0.0

        self.queue.append(work)
        return event

    def milliseconds(self, first: Any, second: Any) -> float:
        return float(second.at - first.at)

    def wait(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            self.clock += work()

    def state(self) -> dict[str, Any]:
        return {"clock_sm_mhz": 1980, "temperature_c": 45}


class FakeContext:
    """IExecutionContext: shapes inside the profile, all addresses set, then it runs."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self.engine.device.stream
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        good = all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if good:
            self.shapes[name] = tuple(shape)
        return good

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shapes, "the shape of an output is unknown before the inputs'"
        return self.engine.output_shape(self.shapes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 16 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == self.engine.device.stream
        if set(self.addresses) != {"x", "logits"} or "x" not in self.shapes or self.engine.breaks:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def work() -> float:
            x = _floats(addresses["x"], shapes["x"])
            result = self.engine.compute(np.array(x)).astype(np.float32)
            _floats(addresses["logits"], result.shape)[...] = result
            return ENGINE_MS

        self.engine.device.queue.append(work)
        return True


class FakeEngine:
    """ICudaEngine with one input ``x`` and one output ``logits``."""

    def __init__(
        self,
        device: FakeDevice,
        compute: Callable[[np.ndarray], np.ndarray],
        profiles: list[tuple[tuple[int, ...], ...]],
        output_shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]],
    ) -> None:
        self.device, self.compute, self.profiles = device, compute, profiles
        self.output_shape, self.breaks, self.contexts = output_shape, False, 0
        self.memory = True

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name == "x"
        return list(self.profiles[profile_index])

    def create_execution_context(self) -> FakeContext | None:
        self.contexts += 1
        return FakeContext(self) if self.memory else None


def runtime_module(engine: FakeEngine | None) -> Any:
    """Return a module whose runtime gives this engine, or refuses with None."""

    class Runtime:
        __slots__ = ("engine_host_code_allowed",)

        def __init__(self, logger: Any) -> None:
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
            assert isinstance(serialized_engine, bytes)
            return engine

    class Logger:
        ERROR, VERBOSE = 1, 4

        def __init__(self, level: int) -> None:
            pass

    return SimpleNamespace(__name__="fake", __version__="10.9.0", Runtime=Runtime, Logger=Logger)


def _floats(address: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, (size,)).reshape(shape)


FLAGS = ("TF32", "REFIT", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")


class FakeConfig:
    """IBuilderConfig; ``__slots__`` refuses names that are not documented."""

    __slots__ = (
        "cache", "cleared", "flags", "hardware_compatibility_level", "max_aux_streams",
        "mismatch", "plugins_to_serialize", "profiles", "profiling_verbosity", "progress_monitor",
    )  # fmt: skip

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.cleared: set[str] = set()
        self.profiles: list[Any] = []
        self.cache: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.cleared.add(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        if serialized_timing_cache and not serialized_timing_cache.startswith(b"cache of Fake GPU"):
            return None
        return SimpleNamespace(data=serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache, self.mismatch = cache, ignore_mismatch
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"cache of Fake GPU: 3 tactics")


class FullTensorRT:
    """What of full TensorRT's module a build uses; ``seen`` keeps what was asked of it."""

    def __init__(self, version: str) -> None:
        self.__name__, self.__version__ = f"fake_tensorrt_{version.replace('.', '_')}", version
        major, minor = (int(x) for x in version.split(".")[:2])
        self.seen: dict[str, Any] = {}
        self.Logger = type("Logger", (), {"VERBOSE": 4, "__init__": lambda s, level: None})
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.BuilderFlag = SimpleNamespace(**{name: name for name in FLAGS})
        strong = {"STRONGLY_TYPED": 1} if major < 11 else {}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**strong)
        levels = {"NONE": "none", "AMPERE_PLUS": "ampere+"}
        if (major, minor) >= (10, 8):
            levels["SAME_COMPUTE_CAPABILITY"] = "same"
        self.HardwareCompatibilityLevel = SimpleNamespace(**levels)
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.IProgressMonitor = type("IProgressMonitor", (), {})

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        seen = self.seen

        class Builder:
            def create_network(self, flags: int) -> Any:
                seen["flags"] = flags
                return SimpleNamespace(num_layers=3, get_layer=None)

            def create_builder_config(self) -> FakeConfig:
                seen["config"] = FakeConfig()
                return seen["config"]  # type: ignore[no-any-return]

            def create_optimization_profile(self) -> Any:
                shapes: dict[str, Any] = {}
                return SimpleNamespace(
                    shapes=shapes, set_shape=lambda n, a, b, c: shapes.update({n: (a, b, c)})
                )

            def build_serialized_network(self, network: Any, config: FakeConfig) -> bytes:
                config.progress_monitor.phase_start("Building", None, 2)
                assert config.progress_monitor.step_complete("Building", 0) is True
                config.progress_monitor.phase_finish("Building")
                return b"full engine"

        return Builder()

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(parse=lambda data: True)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        layers = [{"Name": "a", "LayerType": "gemm"}, {"Name": "attn", "LayerType": "PluginV3"}]
        seen = self.seen

        def information(form: str) -> str:
            assert form == "json"
            return json.dumps({"Layers": layers})

        class Runtime:
            engine_host_code_allowed = False

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                assert data == b"full engine"
                seen["allowed"] = self.engine_host_code_allowed
                inspector = SimpleNamespace(get_engine_information=information)
                return SimpleNamespace(create_engine_inspector=lambda: inspector)

        return Runtime()
