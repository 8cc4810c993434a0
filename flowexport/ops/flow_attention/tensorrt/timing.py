"""Timing the kernel against what else computes, or replaces, Flow-Attention on a GPU."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary
from flowexport.ops.flow_attention.tensorrt.shapes import Shape
from flowexport.ops.flow_attention.variant import FlowVariant

if TYPE_CHECKING:
    from torch import Tensor

EAGER_LIMIT = 1024
"""Tokens above which the published causal form's (B, L, H, D, M) tensor is not attempted."""

KERNEL, GRAPH, EAGER = "kernel", "kernel, CUDA graph", "published, eager"
COMPILED = ", torch.compile"
SDPA, FLASH = "softmax attention, SDPA", "softmax attention, FlashAttention"

_QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"


@dataclass
class Timing:
    """One contender at one shape: median and spread in microseconds, or why there is none."""

    shape: Shape
    dtype: str
    contender: str
    microseconds: float | None = None
    low: float | None = None
    high: float | None = None
    bytes_moved: int | None = None
    percent_of_copy: float | None = None
    failure: str | None = None


def fit(shape: Shape, variant: FlowVariant) -> Shape:
    """Return the shape with S = L where the variant needs that."""
    b, sinks, sources, h, d, m = shape
    same = variant.causal or variant.flow_axis == "heads"
    return (b, sinks, sinks if same else sources, h, d, m)


def draw(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return normal q, k, v, the same on every machine for one shape."""
    import torch

    b, sinks, sources, h, d, m = shape
    generator = torch.Generator().manual_seed(sum(shape))
    kind = getattr(torch, dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(kind).to(device)

    return normal(b, sinks, h, d), normal(b, sources, h, d), normal(b, sources, h, m)


Clock = Callable[[Callable[[], object], int], list[float]]
"""(call, how many times) -> seconds of each call."""


def cuda_clock(call: Callable[[], object], repeats: int) -> list[float]:
    """Time calls by CUDA events, writing 256 MiB before each so that L2 holds none of its input."""
    import torch

    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Return a replay of the call as a CUDA graph: no launch gaps between its kernels."""
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(clock: Clock, device: str, elements: int = 1 << 28) -> float:
    """Return bytes a second of a device-to-device copy, reads and writes both counted."""
    import torch

    source = torch.empty(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock(lambda: target.copy_(source), 3)
    return 8 * elements / statistics.median(clock(lambda: target.copy_(source), 10))


def traffic(shape: Shape, dtype: str) -> int:
    """Return the bytes four passes move: q and k three times each, v and the result once."""
    b, sinks, sources, h, d, m = shape
    size = 4 if dtype == "float32" else 2
    return size * b * h * (3 * (sinks + sources) * d + (sources + sinks) * m)


def contenders(
    library: KernelLibrary, variant: FlowVariant, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return what is timed, by name; each value prepares its call (compiling may fail)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from flowexport.ops.flow_attention.lowered import FORMS, applicable
    from flowexport.ops.flow_attention.op import op_arguments
    from flowexport.ops.flow_attention.table import WITH_LAYERS

    arguments = op_arguments(variant)
    published = FORMS["published"]
    short = not variant.causal or q.shape[1] <= EAGER_LIMIT

    def compiled(form: Callable[..., Tensor]) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            torch.compiler.reset()
            function = torch.compile(form, dynamic=False)
            return lambda: function(q, k, v, *arguments)

        return prepare

    result: dict[str, Callable[[], Callable[[], object]]] = {
        KERNEL: lambda: lambda: library(q, k, v, variant)
    }
    if q.is_cuda:
        result[GRAPH] = lambda: graphed(lambda: library(q, k, v, variant))
    if short:
        result[EAGER] = lambda: lambda: published(q, k, v, *arguments)
    for name in applicable(variant):
        if (name != "published" or short) and not name.endswith(WITH_LAYERS):
            result[f"{name}{COMPILED}"] = compiled(FORMS[name])
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))

    def softmax() -> object:
        return scaled_dot_product_attention(qh, kh, vh, is_causal=variant.causal)

    def flash() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return softmax()

    result[SDPA] = lambda: softmax
    if q.is_cuda:  # on a CPU the same name stands for another algorithm
        result[FLASH] = lambda: flash
    return result


def time_shape(
    library: KernelLibrary,
    variant: FlowVariant,
    shape: Shape,
    dtype: str,
    clock: Clock,
    copy: float,
    repeats: int,
) -> Iterator[Timing]:
    """Time every contender at one shape; one that fails yields its reason and the rest go on."""
    import torch

    shape = fit(shape, variant)
    q, k, v = draw(shape, dtype, "cpu" if library.is_host else "cuda")
    for name, prepare in contenders(library, variant, q, k, v).items():
        timing = Timing(shape, dtype, name)
        try:
            with torch.no_grad():
                call = prepare()
                clock(call, 3)  # warm up, and compile
                samples = sorted(clock(call, repeats))
        except Exception as error:  # any contender may run out of memory or fail to compile
            timing.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            yield timing
            continue
        middle = statistics.median(samples)
        timing.microseconds = 1e6 * middle
        timing.low, timing.high = (
            1e6 * samples[len(samples) // 10],
            1e6 * samples[len(samples) * 9 // 10],
        )
        if name in (KERNEL, GRAPH):
            timing.bytes_moved = traffic(shape, dtype)
            timing.percent_of_copy = 100 * timing.bytes_moved / middle / copy
        yield timing


@dataclass
class Gain:
    """How many times faster the kernel is than one contender at one shape."""

    shape: Shape
    dtype: str
    against: str
    times: float


def gains(timings: Iterable[Timing]) -> list[Gain]:
    """Return the kernel's gain over each question's contender, shape by shape.

    The questions: the published equations eagerly, ``torch.compile`` of them,
    of the fastest form, and softmax attention. The kernel's time is that of
    its CUDA graph where there is one. A contender that failed has no gain.
    """
    result = []
    shapes: dict[tuple[Shape, str], dict[str, float]] = {}
    for one in timings:
        if one.microseconds is not None:
            shapes.setdefault((one.shape, one.dtype), {})[one.contender] = one.microseconds
    for (shape, dtype), times in shapes.items():
        ours = times.get(GRAPH, times.get(KERNEL))
        if ours is None:
            continue
        forms = {n: t for n, t in times.items() if n.endswith(COMPILED)}
        best = min(forms, key=forms.__getitem__, default=None)
        asked = dict.fromkeys((EAGER, f"published{COMPILED}", best, SDPA, FLASH))
        result += [Gain(shape, dtype, n, times[n] / ours) for n in asked if n in times]
    return result


def gpu_state() -> dict[str, str]:
    """Return name, driver, clocks, temperature and power from nvidia-smi; empty without it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY.split(","), done.stdout.splitlines()[0].split(", "), strict=False))
