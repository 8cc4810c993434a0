"""Packs ``weight.bin``: what a program reads, each blob once; zero points of 0 as one number.

coremltools writes a vector of int8 zeros beside every compressed matrix. Its own operator
takes a scalar for a vector: ``scale * (data - zero_point)``.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from flowexport.targets.coreml.package import BLOB, WEIGHTS_FILE, held_values, operations

_HEADER = struct.Struct("<II")  # blobs, version; the rest of the first 64 bytes is 0
_ALIGNMENT = 64


def pack(path: Path, spec: Any) -> None:
    """Write the package's weights again, and the places of its blobs into ``spec``.

    Args:
        path: of a package whose weights are there.
        spec: its ``Model``; changed.
    """
    file = path / WEIGHTS_FILE
    if not file.is_file():
        return
    old = file.read_bytes()
    for op in operations(spec):
        if op.type == "constexpr_affine_dequantize":
            _plain_zero_point(op.attributes["zero_point"], old)
    values = [v for op in operations(spec) for _, v in held_values(op)]
    stored = [v.blobFileValue for v in values if v.WhichOneof("value") == "blobFileValue"]
    new = bytearray(_ALIGNMENT)
    places: dict[tuple[bytes, bytes], int] = {}
    for blob in sorted(stored, key=lambda b: b.offset):
        sentinel, dtype, length, start = BLOB.unpack_from(old, blob.offset)
        # Behind the place lies how many bits of the last byte are no value.
        rest = old[blob.offset + BLOB.size : blob.offset + _ALIGNMENT]
        key = (bytes([dtype]) + rest, old[start : start + length])
        if key not in places:
            places[key] = len(new)
            new += BLOB.pack(sentinel, dtype, length, len(new) + _ALIGNMENT) + rest + key[1]
            new += bytes(-len(new) % _ALIGNMENT)
        blob.offset = places[key]
    version = _HEADER.unpack_from(old)[1]
    new[:_ALIGNMENT] = old[:_ALIGNMENT]
    _HEADER.pack_into(new, 0, len(places), version)
    file.write_bytes(new)


def _plain_zero_point(value: Any, weights: bytes) -> None:
    """Write a vector of zeros as the scalar 0."""
    held = value.immediateValue.tensor.bytes.values
    if value.WhichOneof("value") == "blobFileValue":
        _, _, length, start = BLOB.unpack_from(weights, value.blobFileValue.offset)
        held = weights[start : start + length]
    if any(held):
        return
    kind = value.type.tensorType
    kind.rank = 0
    del kind.dimensions[:]
    value.immediateValue.tensor.bytes.values = b"\0"
