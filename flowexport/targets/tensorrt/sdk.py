"""One face for TensorRT-RTX and full TensorRT: which is here, and where they differ."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
}


@dataclass(frozen=True)
class SDK:
    """One of the two libraries.

    Attributes:
        module: what Python imports.
        version: of the installed package.
    """

    module: str
    version: str

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU and is always strongly typed."""
        return self.module == "tensorrt_rtx"

    @property
    def label(self) -> str:
        return "TensorRT-RTX" if self.rtx else "TensorRT"

    def load(self) -> Any:
        """Import the library."""
        return importlib.import_module(self.module)


def installed(module: str) -> SDK | None:
    """Return one library if Python can find it; imports nothing."""
    if find_spec(module) is None:
        return None
    for package in PACKAGES[module]:
        try:
            return SDK(module, version(package))
        except PackageNotFoundError:
            continue
    return SDK(module, "unknown")


def find(*, gpu: bool) -> SDK | None:
    """Return the library to build with.

    Full TensorRT needs a GPU to build, so it is taken only where one is; else
    TensorRT-RTX, which builds anywhere.
    """
    full, rtx = installed("tensorrt"), installed("tensorrt_rtx")
    if full and (gpu or rtx is None):
        return full
    return rtx


@cache
def driver_problem() -> str | None:
    """Return why CUDA's driver cannot be used here, or None where it can."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if code := cuda.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit gives {code})"
    count = ctypes.c_int()
    if code := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not count its GPUs (error {code})"
    return None if count.value else "there is no NVIDIA GPU"


@cache
def gpu_capability() -> str | None:
    """Return the compute capability of the first GPU as ``"89"``, or None where there is none."""
    if driver_problem() is not None:
        return None
    cuda = ctypes.CDLL("libcuda.so.1")
    device, parts = ctypes.c_int(), []
    if cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        parts.append(value.value)
    return f"{parts[0]}{parts[1]}"
