"""Tensors in one little-endian binary file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import BundleError, InputError
from flowexport.core.hashing import sha256_file

DTYPES = ("float32", "float64", "int32", "uint8")
ALIGNMENT = 8
"""A typed array of a browser begins at a multiple of its item's size."""


class Binary:
    """Collects tensors and writes them one after the other.

    Args:
        path: the file.
        root: the package's folder, which the file's entry is relative to.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: str, value: np.ndarray) -> dict[str, Any]:
        """Append a tensor and return its entry; raises InputError for a dtype clients lack."""
        if value.dtype.name not in DTYPES:
            raise InputError(
                f"package {self.path.name}: {name} has dtype {value.dtype.name};"
                f" expected one of: {', '.join(DTYPES)}."
            )
        data = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
        entry = {
            "name": name,
            "dtype": value.dtype.name,
            "shape": list(value.shape),
            "offset": self._size,
            "bytes": len(data),
        }
        padding = bytes(-len(data) % ALIGNMENT)
        self._parts += [data, padding]
        self._size += len(data) + len(padding)
        return entry

    def add_all(self, values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        return [self.add(name, value) for name, value in values.items()]

    def write(self) -> dict[str, Any]:
        """Write the file and return its entry."""
        self.path.write_bytes(b"".join(self._parts))
        return file_entry(self.path, self.root)


def file_entry(path: Path, root: Path) -> dict[str, Any]:
    """Return path, sha256 and size of a finished file."""
    return {
        "path": path.relative_to(root).as_posix(),
        "sha256": sha256_file(path),
        "size_bytes": path.stat().st_size,
    }


def read_tensor(data: bytes, entry: Mapping[str, Any], where: str) -> np.ndarray:
    """Return the tensor of an entry; raises BundleError where the file does not hold it."""
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    start, count, shape = entry["offset"], entry["bytes"], tuple(entry["shape"])
    expected = int(np.prod(shape)) * dtype.itemsize
    if count != expected or start + count > len(data):
        raise BundleError(
            f"{where}: {entry['name']} has bytes {start} to {start + count} of {len(data)};"
            f" expected {expected} bytes inside the file."
        )
    values = np.frombuffer(data, dtype, int(np.prod(shape)), start)
    return values.reshape(shape).astype(dtype.newbyteorder("="))
