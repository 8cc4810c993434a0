"""An engine on a GPU: buffers made once, one CUDA graph a shape, times by CUDA events."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import BundleError, InputError, UnavailableError, VerificationError
from flowexport.core.types import Artifact, RuntimeInfo, Session, TensorSpec
from flowexport.targets.tensorrt.device import CudaDevice
from flowexport.targets.tensorrt.sdk import SDK

if TYPE_CHECKING:
    from torch import Tensor

ALLOW = "FLOWEXPORT_ALLOW_ENGINE_CODE"
"""Environment variable: 1 lets an engine run the native code that it carries."""

# Each shape has a context with scratch memory of its own: a graph is of one context's shapes.
MOST_SHAPES = 4
MOST_SAMPLES = 10_000

Range = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class _Ready:
    """One input shape, ready to run.

    Attributes:
        context: of this shape alone.
        launch: enqueues the engine, by its CUDA graph where there is one.
    """

    context: Any
    launch: Callable[[], None]
    outputs: Mapping[str, tuple[int, ...]]


class TensorRTSession(Session):
    """Deserialises an engine and runs it on a stream of its own.

    Args:
        device: the GPU; torch's current one by default.

    Raises:
        UnavailableError: torch sees no GPU, there is no kernel for the plugin,
            or the engine carries code that nobody has allowed.
        BundleError: the engine is broken, or of another GPU or library version.
    """

    def __init__(self, artifact: Artifact, sdk: SDK, device: CudaDevice | None = None) -> None:
        super().__init__(artifact)
        self._where = f"load tensorrt {artifact.model}"
        if device is None:
            _require_torch(self._where)
            device = CudaDevice()
        self._device = device
        self._trt = trt = sdk.load()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._plugin: Any = self._register()
        self._runtime = trt.Runtime(self._logger)
        self._allow_code()
        self._engine = self._deserialise(sdk)
        self._ranges = [self._profile(i) for i in range(self._engine.num_optimization_profiles)]
        names = [s.name for s in artifact.inputs if isinstance(s.shape[0], str)]
        largest = [ranges[name][1][0] for ranges in self._ranges for name in names]
        self.max_batch = max(largest, default=None)
        self._ready: dict[tuple[Any, ...], _Ready] = {}
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._times: deque[tuple[float, float, float]] = deque(maxlen=MOST_SAMPLES)
        self._graph: bool | str | None = None
        self._allocate()
        self._version, self._label = str(trt.__version__), sdk.label

    @property
    def info(self) -> RuntimeInfo:
        """Describe the runtime; the times of all runs so far stand in its details."""
        return RuntimeInfo(
            name=self._label,
            version=self._version,
            threads=1,
            details={
                "gpu": self._device.name,
                "cuda": self._device.cuda,
                "cuda_graph": self._graph,
                "cuda_events_ms": self._summary(),
                "gpu_state": self._device.state(),
            },
        )

    def _summary(self) -> dict[str, Any] | None:
        """Return quantiles of the GPU's own times; the transfers stand apart."""
        if not self._times:
            return None
        names = ("host_to_device", "engine", "device_to_host")
        columns = zip(*self._times, strict=True)
        result: dict[str, Any] = {"runs": len(self._times)}
        for name, values in zip(names, columns, strict=True):
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
            result[name] = {"p10": float(low), "p50": float(middle), "p90": float(high)}
        return result

    def _register(self) -> Any:
        """Make the plugin known before the engine that holds it is read."""
        facts = self.artifact.details.get("plugin") or {}
        if not facts.get("used"):
            return None
        library = self.artifact.options.get("plugin_library")
        if facts["creator"] == "c++" and library and Path(str(library)).is_file():
            loaded = self._trt.get_plugin_registry().load_library(str(library))
            if loaded is None:
                raise UnavailableError(
                    f"{self._where}: TensorRT refuses the plugin library {library}.",
                    fix="build it again with CMake for this TensorRT",
                )
            return loaded
        from flowexport.ops.flow_attention.tensorrt.plugin import register_plugin
        from flowexport.ops.flow_attention.tensorrt.plugin_fields import find_kernel

        kernels = register_plugin(self._trt, capability=self._device.capability)
        try:  # compile now, and not in the first run
            kernels.library = find_kernel(facts["kernel_source_sha256"], kernels).path
        except UnavailableError as error:
            raise UnavailableError(
                f"{self._where}: the plugin's kernel cannot be had: {error.message}",
                fix=f"{error.fix}; or convert again with --no-plugin",
            ) from error
        return kernels

    def _allow_code(self) -> None:
        details = self.artifact.details
        carried = (details.get("plugin") or {}).get("embedded") or details.get("version_compatible")
        if not carried:
            return
        if os.environ.get(ALLOW) != "1":
            raise UnavailableError(
                f"{self._where}: the engine carries native code (a plugin library, or the runtime"
                " of a version-compatible engine); expected a word that it may run.",
                fix=f"set {ALLOW}=1 if you trust {self.artifact.path.name} like a program",
            )
        self._runtime.engine_host_code_allowed = True

    def _deserialise(self, sdk: SDK) -> Any:
        engine = self._runtime.deserialize_cuda_engine(self.artifact.path.read_bytes())
        if engine is not None:
            return engine
        built = self.artifact.details
        wanted = ", ".join(built.get("compute_capabilities", ())) or "others"
        here = self._device.capability
        raise BundleError(
            f"{self._where}: {sdk.label} {self._trt.__version__} on {self._device.name} (compute"
            f" capability {here[:-1]}.{here[-1]}) refuses {self.artifact.path.name}; it was built"
            f" by {built.get('builder', 'another version')} for compute capability {wanted}.",
            fix="convert on this machine, or with its compute capability in the recipe's"
            " compute_capabilities",
        )

    def _profile(self, index: int) -> dict[str, Range]:
        """Return the smallest and largest shape of each dynamic input."""
        found = {}
        for spec in self.artifact.inputs:
            if spec.dynamic:
                low, _, high = self._engine.get_tensor_profile_shape(spec.name, index)
                found[spec.name] = (tuple(map(int, low)), tuple(map(int, high)))
        return found

    def _context(self, index: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise UnavailableError(
                f"{self._where}: the GPU gives no memory for the engine's profile {index}.",
                fix="free its memory, or convert with smaller profiles",
            )
        if not context.set_optimization_profile_async(index, self._device.stream):
            raise VerificationError(f"{self._where}: the engine refuses its profile {index}.")
        self._device.wait()
        return context

    def _allocate(self) -> None:
        """Make every buffer as large as the largest shape of any profile needs."""
        sizes: dict[str, int] = {}
        for index, ranges in enumerate(self._ranges):
            context = self._context(index)
            for spec in self.artifact.inputs:
                shape = ranges[spec.name][1] if spec.dynamic else spec.shape
                if spec.dynamic:
                    context.set_input_shape(spec.name, shape)
                sizes[spec.name] = max(sizes.get(spec.name, 0), _bytes(spec, shape))
            for spec in self.artifact.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                sizes[spec.name] = max(sizes.get(spec.name, 0), _bytes(spec, shape))
        for name, size in sizes.items():
            self._buffers[name] = (self._device.memory(size), self._device.pinned(size))

    def _prepare(self, shapes: tuple[tuple[int, ...], ...]) -> _Ready:
        """Set shapes and addresses, run once, and capture the graph."""
        specs = self.artifact.inputs
        wanted = dict(zip((s.name for s in specs), shapes, strict=True))
        fitting = [i for i, ranges in enumerate(self._ranges) if _covers(ranges, wanted)]
        if not fitting:
            told = "; ".join(
                f"{name} {'x'.join(map(str, low))} to {'x'.join(map(str, high))}"
                for ranges in self._ranges
                for name, (low, high) in ranges.items()
            )
            sizes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in wanted.items())
            raise InputError(
                f"run tensorrt {self.artifact.model}: no profile of the engine covers {sizes};"
                f" expected {told}.",
                fix="widen targets.tensorrt.profiles and convert again",
            )
        context = self._context(fitting[0])
        for name, shape in wanted.items():
            context.set_input_shape(name, shape)
        for name, (memory, _) in self._buffers.items():
            context.set_tensor_address(name, memory.data_ptr())
        outputs = {
            s.name: tuple(int(n) for n in context.get_tensor_shape(s.name))
            for s in self.artifact.outputs
        }

        def enqueue() -> None:
            if not context.execute_async_v3(self._device.stream):
                raise VerificationError(
                    f"run tensorrt {self.artifact.model}: the engine failed; expected it to run."
                )

        enqueue()  # what a first run compiles or loads cannot be captured
        self._device.wait()
        launch: Callable[[], None] = enqueue
        try:
            launch = self._device.capture(enqueue)
            self._graph = True
        except RuntimeError as error:
            self._graph = f"no: {(str(error).splitlines() or [''])[0][:200]}"
        return _Ready(context, launch, outputs)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        import torch

        device = self._device
        shapes = tuple(tuple(feeds[s.name].shape) for s in self.artifact.inputs)
        first = shapes not in self._ready
        if first:
            if len(self._ready) >= MOST_SHAPES:
                del self._ready[next(iter(self._ready))]
            self._ready[shapes] = self._prepare(shapes)
        ready = self._ready[shapes]
        for spec in self.artifact.inputs:
            value = np.ascontiguousarray(feeds[spec.name]).reshape(-1).view(np.uint8)
            self._buffers[spec.name][1][: value.size].copy_(torch.from_numpy(value))
        marks = [device.mark()]
        for spec in self.artifact.inputs:
            size = feeds[spec.name].nbytes
            memory, pinned = self._buffers[spec.name]
            device.copy(memory[:size], pinned[:size])
        marks.append(device.mark())
        ready.launch()
        marks.append(device.mark())
        for spec in self.artifact.outputs:
            size = _bytes(spec, ready.outputs[spec.name])
            memory, pinned = self._buffers[spec.name]
            device.copy(pinned[:size], memory[:size])
        marks.append(device.mark())
        device.wait()
        if not first:
            a, b, c, d = marks
            times = (device.milliseconds(a, b), device.milliseconds(b, c))
            self._times.append((*times, device.milliseconds(c, d)))
        return {
            s.name: self._buffers[s.name][1][: _bytes(s, ready.outputs[s.name])]
            .numpy()
            .copy()
            .view(s.dtype)
            .reshape(ready.outputs[s.name])
            for s in self.artifact.outputs
        }

    def close(self) -> None:
        self._ready.clear()
        self._engine = self._runtime = None


def _require_torch(where: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(
            f"{where}: this torch ({torch.__version__}) sees no GPU.",
            fix="pip install torch with CUDA (https://pytorch.org/get-started)",
        )


def _bytes(spec: TensorSpec, shape: tuple[Any, ...]) -> int:
    return int(np.prod([int(d) for d in shape], dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _covers(ranges: Mapping[str, Range], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        all(a <= n <= b for a, n, b in zip(low, shapes[name], high, strict=True))
        for name, (low, high) in ranges.items()
    )
