"""Call the compiled kernel on torch tensors, through its plain C interface."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from flowexport.core.errors import InputError, UnavailableError
from flowexport.ops.flow_attention.variant import FlowVariant

if TYPE_CHECKING:
    from torch import Tensor

MAX_WIDTH = 128
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
_ALIGNMENT = 256


class Problem(ctypes.Structure):
    """``flowexport_flow_attention_problem`` of ``cuda/flow_attention.h``, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "sinks", "sources", "heads")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "width",
                "value_width",
                "dtype",
                "feature_map",
                "clamped",
                "causal",
                "flow_over_heads",
                "competition_over_heads",
            )
        ),
        *((name, ctypes.c_float) for name in ("clamp_low", "clamp_high", "eps", "outer_eps")),
        ("splits", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def problem(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    dtype: str,
    variant: FlowVariant,
    splits: int = 0,
) -> Problem:
    """Describe one call of the kernel.

    Args:
        q_shape: (B, L, H, D).
        k_shape: (B, S, H, D).
        v_shape: (B, S, H, M).
        dtype: float32, float16 or bfloat16; sums are float32 in every case.
        variant: which published variant.
        splits: token segments to use instead of the planned number (tests).

    Raises:
        InputError: the shapes do not fit each other, or the dtype is another.
    """
    b, sinks, heads, width = q_shape
    sources, value_width = v_shape[1], v_shape[3]
    if tuple(k_shape) != (b, sources, heads, width) or (v_shape[0], v_shape[2]) != (b, heads):
        raise InputError(
            f"kernel: q, k, v have shapes {tuple(q_shape)}, {tuple(k_shape)}, {tuple(v_shape)};"
            " expected (B, L, H, D), (B, S, H, D), (B, S, H, M)."
        )
    if dtype not in DTYPE_CODES:
        raise InputError(f"kernel: dtype is {dtype}; expected one of {sorted(DTYPE_CODES)}.")
    low, high = variant.clamp or (0.0, 0.0)
    return Problem(
        batch=b,
        sinks=sinks,
        sources=sources,
        heads=heads,
        width=width,
        value_width=value_width,
        dtype=DTYPE_CODES[dtype],
        feature_map=int(variant.feature_map == "relu"),
        clamped=int(variant.clamp is not None),
        causal=int(variant.causal),
        flow_over_heads=int(variant.flow_axis == "heads"),
        competition_over_heads=int(variant.competition_axis == "heads"),
        clamp_low=low,
        clamp_high=high,
        eps=variant.eps,
        outer_eps=variant.outer_eps,
        splits=splits,
    )


class KernelLibrary:
    """A compiled kernel: :func:`build.build_host`'s or :func:`build.build_cuda`'s file.

    Attributes:
        path: the shared library.
        is_host: whether it computes on the CPU.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self._check = library.flowexport_flow_attention_check
            self._workspace = library.flowexport_flow_attention_workspace
            self._launch = library.flowexport_flow_attention_launch
            self._status = library.flowexport_flow_attention_status
            is_host = library.flowexport_flow_attention_is_host
        except (OSError, AttributeError) as error:
            raise UnavailableError(
                f"kernel: {path} cannot be loaded ({error}); expected a flowexport kernel library.",
                fix="build it again with flowexport.ops.flow_attention.tensorrt.build",
            ) from error
        pointer = ctypes.POINTER(Problem)
        self._check.argtypes, self._check.restype = [pointer], ctypes.c_char_p
        self._workspace.argtypes, self._workspace.restype = [pointer], ctypes.c_size_t
        void = ctypes.c_void_p
        self._launch.argtypes = [pointer, void, void, void, void, void, ctypes.c_size_t, void]
        self._launch.restype = ctypes.c_int
        self._status.argtypes, self._status.restype = [ctypes.c_int], ctypes.c_char_p
        self.is_host = bool(is_host())

    def workspace(self, described: Problem) -> int:
        """Return the bytes of scratch memory for this problem and every smaller one.

        Raises:
            InputError: the kernel cannot compute the problem; the message says why.
        """
        reason = self._check(ctypes.byref(described))
        if reason is not None:
            raise InputError(f"kernel: {reason.decode()}.")
        return int(self._workspace(ctypes.byref(described)))

    def launch_pointers(
        self,
        described: Problem,
        q: int,
        k: int,
        v: int,
        out: int,
        workspace: int,
        workspace_bytes: int,
        stream: int = 0,
    ) -> None:
        """Enqueue on raw pointers (device pointers for a CUDA library).

        Raises:
            InputError: the problem, a pointer or the workspace does not fit.
            UnavailableError: the CUDA runtime refused the launch.
        """
        status = self._launch(
            ctypes.byref(described), q, k, v, out, workspace, workspace_bytes, stream
        )
        if status == 0:
            return
        message = f"kernel: launch returned {status}: {self._status(status).decode()}."
        raise InputError(message) if status < 0 else UnavailableError(message)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant, *, splits: int = 0
    ) -> Tensor:
        """Compute Flow-Attention.

        Args:
            q: sinks' logits before the feature map, (B, L, H, D).
            k: sources' logits before the feature map, (B, S, H, D).
            v: sources' values, (B, S, H, M).
            variant: which published variant.
            splits: token segments to use instead of the planned number (tests).

        Returns:
            (B, L, H, M) of the inputs' dtype, on their device, enqueued on
            torch's current stream.

        Raises:
            InputError: shapes, dtypes or the device do not fit the library.
        """
        import torch

        from flowexport.ops.flow_attention.reference import check_inputs

        check_inputs(q, k, v, variant)
        device = "cpu" if self.is_host else "cuda"
        if any(x.device.type != device for x in (q, k, v)):
            raise InputError(f"kernel: tensors are on {q.device}; expected {device}.")
        dtype = str(q.dtype).removeprefix("torch.")
        q, k, v = (x.detach().contiguous() for x in (q, k, v))
        described = problem(tuple(q.shape), tuple(k.shape), tuple(v.shape), dtype, variant, splits)
        size = self.workspace(described)
        scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=q.device)
        start = -scratch.data_ptr() % _ALIGNMENT
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        stream = 0 if self.is_host else torch.cuda.current_stream(q.device).cuda_stream
        inputs = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        self.launch_pointers(
            described, *inputs, out.data_ptr(), scratch.data_ptr() + start, size, stream
        )
        return out
