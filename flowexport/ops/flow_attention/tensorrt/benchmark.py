"""``python -m flowexport.ops.flow_attention.tensorrt.benchmark``: is the kernel right, how fast.

Correctness comes first: every published variant, over shapes and dtypes,
against float64. Then the kernel is timed by CUDA events against the published
equations run eagerly, ``torch.compile`` of them and of each export-friendly
form, and ``scaled_dot_product_attention`` with FlashAttention at the same
shapes (softmax attention: what a model would use instead, not the same result).

``--host`` checks the host build of the same source and times nothing.
``--sanitize`` runs the checks under each tool of compute-sanitizer. Exit codes:
0, 4 when an error exceeds its tolerance or a tool complains, 5 without a GPU,
a compiler or compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
from flowexport.ops.flow_attention.tensorrt.sanitize import ToolRun, sanitize
from flowexport.ops.flow_attention.tensorrt.shapes import CHECKED, LONG, TIMED, Shape, causal_truth
from flowexport.ops.flow_attention.tensorrt.timing import (
    Gain,
    Timing,
    copy_bandwidth,
    cuda_clock,
    draw,
    fit,
    gains,
    gpu_state,
    time_shape,
)
from flowexport.ops.flow_attention.variant import VARIANTS

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 8e-3}
"""Of the largest output. Sums are float32; the 16-bit ones are the output's own rounding."""


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
class Result:
    """Everything a run found, as written to ``--json``."""

    device: dict[str, str]
    source_sha256: str
    library: str
    checks: list[Check] = field(default_factory=list)
    copy_bytes_per_second: float | None = None
    timings: list[Timing] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    sanitizer: list[ToolRun] = field(default_factory=list)
    clocks: list[dict[str, str]] = field(default_factory=list)


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
    parser.add_argument("--sanitize", action="store_true", help="check under compute-sanitizer")
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
    if arguments.sanitize:
        if arguments.host:
            raise InputError("benchmark kernel: --sanitize needs the GPU; expected no --host.")
        result.sanitizer = sanitize(path, variants, dtypes)
        for tool in result.sanitizer:
            print(f"compute-sanitizer {tool.tool}: {'clean' if tool.clean else tool.said}")
        return result, all(tool.clean for tool in result.sanitizer)
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
    result.gains = gains(result.timings)
    for gain in result.gains:
        print(f"{gain.shape!s:<32}{gain.dtype:<10}{gain.times:>7.1f} × faster than {gain.against}")
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
