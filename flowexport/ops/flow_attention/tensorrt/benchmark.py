"""``python -m flowexport.ops.flow_attention.tensorrt.benchmark``: is the kernel right, how fast.

Correctness comes first: every published variant, over shapes and dtypes,
against float64. Then the kernel is timed by CUDA events against the published
equations run eagerly, ``torch.compile`` of them and of each export-friendly
form, and ``scaled_dot_product_attention`` at the same shapes (softmax
attention: what a model would use instead, not the same result).

``--host`` checks the host build of the same source and times nothing. Exit
codes: 0, 4 when an error exceeds its tolerance, 5 without a GPU or a compiler.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowexport.core.errors import (
    EXIT_OK,
    EXIT_VERIFICATION,
    FlowExportError,
    InputError,
    UnavailableError,
    UnknownNameError,
)
from flowexport.ops.flow_attention.tensorrt.build import build_cuda, build_host, source_hash
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary
from flowexport.ops.flow_attention.tensorrt.shapes import CHECKED, LONG, TIMED, Shape, causal_truth
from flowexport.ops.flow_attention.variant import VARIANTS, FlowVariant

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 8e-3}
"""Of the largest output. Sums are float32; the 16-bit ones are the output's own rounding."""

EAGER_LIMIT = 1024
"""Tokens above which the published causal form's (B, L, H, D, M) tensor is not attempted."""

_QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"


@dataclass
class Check:
    """One comparison with float64; ``error`` is relative to the largest output."""

    variant: str
    shape: Shape
    dtype: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN does not pass


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


@dataclass
class Result:
    """Everything a run found, as written to ``--json``."""

    device: dict[str, str]
    source_sha256: str
    library: str
    checks: list[Check] = field(default_factory=list)
    copy_bytes_per_second: float | None = None
    timings: list[Timing] = field(default_factory=list)
    clocks: list[dict[str, str]] = field(default_factory=list)


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


def check(
    library: KernelLibrary, variants: Iterable[str], shapes: Iterable[Shape], dtypes: Iterable[str]
) -> Iterator[Check]:
    """Compare the kernel with float64 at every combination."""
    from flowexport.ops.flow_attention.reference import flow_attention_reference

    device = "cpu" if library.is_host else "cuda"
    for name in variants:
        variant = VARIANTS[name]
        for shape in dict.fromkeys(fit(shape, variant) for shape in shapes):
            for dtype in dtypes:
                q, k, v = draw(shape, dtype, device)
                reference = causal_truth if variant.causal else flow_attention_reference
                truth = reference(q.double(), k.double(), v.double(), variant)
                result = library(q, k, v, variant)
                worst = float((result.double() - truth).abs().max() / truth.abs().max())
                yield Check(name, shape, dtype, worst, TOLERANCE[dtype])


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
    from torch.nn.functional import scaled_dot_product_attention

    from flowexport.ops.flow_attention.lowered import FORMS, applicable
    from flowexport.ops.flow_attention.op import op_arguments

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
        "kernel": lambda: lambda: library(q, k, v, variant)
    }
    if q.is_cuda:
        result["kernel, CUDA graph"] = lambda: graphed(lambda: library(q, k, v, variant))
    if short:
        result["published, eager"] = lambda: lambda: published(q, k, v, *arguments)
    for name in applicable(variant):
        if (name != "published" or short) and not name.endswith("_projected"):
            result[f"{name}, torch.compile"] = compiled(FORMS[name])
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    result["softmax attention, SDPA"] = lambda: (
        lambda: scaled_dot_product_attention(qh, kh, vh, is_causal=variant.causal)
    )
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
        if name.startswith("kernel"):
            timing.bytes_moved = traffic(shape, dtype)
            timing.percent_of_copy = 100 * timing.bytes_moved / middle / copy
        yield timing


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


def _require_gpu() -> str:
    """Return the compute capability of the GPU that torch uses, as ``90``."""
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(
            "benchmark kernel: no CUDA GPU is visible to torch; expected one.",
            fix="run on a machine with an NVIDIA GPU and a CUDA build of torch, or pass --host",
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _names(kind: str, given: str | None, valid: Iterable[str]) -> list[str]:
    valid = list(valid)
    names = given.split(",") if given else valid
    for name in names:
        if name not in valid:
            raise UnknownNameError(kind, name, valid)
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowexport.ops.flow_attention.tensorrt.benchmark",
        description=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", action="store_true", help="check the host build; time nothing")
    parser.add_argument("--library", type=Path, help="a compiled kernel, instead of building one")
    parser.add_argument("--variants", help="to check, comma-separated; all by default")
    parser.add_argument("--dtypes", help="float32,float16,bfloat16; all by default")
    parser.add_argument("--timed-variant", default="standard", help="to time (standard)")
    parser.add_argument("--timed-dtype", default="float16", help="to time (float16)")
    parser.add_argument("--max-tokens", type=int, default=65536, help="skip longer shapes")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls a contender (50)")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser


def _report_checks(result: Result) -> bool:
    print(
        f"{'variant':<12}{'dtype':<10}{'worst error':>12}{'tolerance':>11}  at (B, L, S, H, D, M)"
    )
    failed = [c for c in result.checks if not c.passed]
    groups: dict[tuple[str, str], list[Check]] = {}
    for c in result.checks:
        groups.setdefault((c.variant, c.dtype), []).append(c)
    for (variant, dtype), members in groups.items():
        worst = max(members, key=lambda c: (c.error != c.error, c.error))
        mark = "" if all(c.passed for c in members) else "  FAILED"
        print(
            f"{variant:<12}{dtype:<10}{worst.error:>12.2e}{worst.tolerance:>11.0e}"
            f"  {worst.shape}{mark}"
        )
    print(f"{len(result.checks) - len(failed)} of {len(result.checks)} checks passed")
    return not failed


def _report_timing(timing: Timing) -> None:
    where = f"{timing.shape!s:<32}{timing.dtype:<10}{timing.contender:<34}"
    if timing.microseconds is None:
        print(f"{where}{timing.failure}")
        return
    share = "" if timing.percent_of_copy is None else f"  {timing.percent_of_copy:.0f} % of copy"
    print(
        f"{where}{timing.microseconds:>12.1f} µs ({timing.low:.1f} to {timing.high:.1f}){share}",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> tuple[Result, bool]:
    """Check, then time, as the command line asks; returns what was found and whether it is right.

    Raises:
        FlowExportError: no GPU, no compiler, or a name nobody knows.
    """
    variants = _names("variant", arguments.variants, VARIANTS)
    dtypes = _names("dtype", arguments.dtypes, TOLERANCE)
    (timed_variant,) = _names("variant", arguments.timed_variant, VARIANTS)
    (timed_dtype,) = _names("dtype", arguments.timed_dtype, TOLERANCE)
    if arguments.repeats < 1 or arguments.max_tokens < 1:
        raise InputError(
            f"benchmark kernel: --repeats is {arguments.repeats} and --max-tokens"
            f" {arguments.max_tokens}; expected at least 1."
        )
    capability = None if arguments.host else _require_gpu()
    path = arguments.library or (build_cuda((capability,)) if capability else build_host())
    library = KernelLibrary(path)
    if library.is_host != arguments.host:
        kind = "host" if library.is_host else "CUDA"
        raise InputError(f"benchmark kernel: {path} is a {kind} library; expected the other kind.")
    state = {"name": platform.processor() or platform.machine()} if arguments.host else gpu_state()
    result = Result(state, source_hash(), path.name)
    shapes = [s for s in (*CHECKED, *LONG) if s[1] <= arguments.max_tokens]
    for one in check(library, variants, shapes, dtypes):
        result.checks.append(one)
    good = _report_checks(result)
    if not good or arguments.host or arguments.check_only:
        return result, good
    result.copy_bytes_per_second = copy_bandwidth(cuda_clock, "cuda")
    print(f"copy: {result.copy_bytes_per_second / 1e12:.2f} TB/s, reads and writes counted")
    for shape in TIMED:
        if shape[1] <= arguments.max_tokens:
            result.clocks.append(gpu_state())
            for timing in time_shape(
                library,
                VARIANTS[timed_variant],
                shape,
                timed_dtype,
                cuda_clock,
                result.copy_bytes_per_second,
                arguments.repeats,
            ):
                result.timings.append(timing)
                _report_timing(timing)
    result.clocks.append(gpu_state())
    return result, good


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        result, good = run(arguments)
        if arguments.json is not None:
            try:
                arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
            except OSError as error:
                raise InputError(
                    f"benchmark kernel: {arguments.json} cannot be written ({error.strerror})."
                ) from error
    except FlowExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK if good else EXIT_VERIFICATION


if __name__ == "__main__":
    sys.exit(main())
