"""What a session needs of the GPU: memory, a stream, graphs, events and its state.

torch holds the memory, so that no second CUDA binding is needed; NVML tells
clocks and temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class CudaDevice:
    """torch's current GPU, with a stream of its own."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @property
    def name(self) -> str:
        return str(self._torch.cuda.get_device_name())

    @property
    def cuda(self) -> str:
        return str(self._torch.version.cuda)

    @property
    def capability(self) -> str:
        """Return the compute capability as ``"89"``."""
        major, minor = self._torch.cuda.get_device_capability()
        return f"{major}{minor}"

    @property
    def stream(self) -> int:
        """Return the stream's handle."""
        return int(self._stream.cuda_stream)

    def memory(self, size: int) -> Tensor:
        """Return bytes on the GPU, (size,), uint8, aligned to 256."""
        result: Tensor = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda")
        return result

    def pinned(self, size: int) -> Tensor:
        """Return page-locked bytes on the host, (size,), uint8: copies from it do not wait."""
        result: Tensor = self._torch.empty(max(size, 1), dtype=self._torch.uint8, pin_memory=True)
        return result

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy between the host and the GPU."""
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return a replay of what ``call`` enqueues, as a CUDA graph.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            call()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def mark(self) -> Any:
        """Enqueue a timing event and return it."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def milliseconds(self, first: Any, second: Any) -> float:
        """Return the GPU's time between two events that have happened."""
        return float(first.elapsed_time(second))

    def wait(self) -> None:
        """Wait for all that was enqueued."""
        self._stream.synchronize()

    def state(self) -> dict[str, Any]:
        """Return clocks (MHz), temperature (°C) and power (W), or why they are not known."""
        uuid = str(self._torch.cuda.get_device_properties().uuid)
        return nvml_state(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def nvml_state(uuid: str) -> dict[str, Any]:
    """Read a GPU's clocks (MHz), temperature (°C) and power (W) from NVML.

    Returns:
        ``{"not_known": why}`` without the package nvidia-ml-py or where NVML refuses.
    """
    try:
        import pynvml
    except ImportError:
        return {"not_known": "nvidia-ml-py is not installed (pip install 'flowexport[tensorrt]')"}
    try:
        pynvml.nvmlInit()
        try:
            gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return {
                "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
                "clock_sm_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                "clock_memory_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            }
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"not_known": f"NVML: {error}"}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
