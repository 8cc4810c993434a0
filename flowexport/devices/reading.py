"""Reads device reports and their tensors; refuses what is no report."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import BundleError
from flowexport.report.schema import validate

SCHEMA = "flowexport.report/1"
MERGE_SCHEMA = "flowexport.merge/1"
FIX = "the demo's Measure page writes a report; `flowexport convert` writes a bundle"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return a JSON object; NaN and Infinity, which JSON has not, are refused.

    Raises:
        BundleError: it cannot be read, or is no object.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise BundleError(f"{what} {path}: cannot be read ({error.strerror}).", fix=FIX) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{what} {path}: is no JSON ({error}).", fix=FIX) from error
    if not isinstance(document, dict):
        raise BundleError(f"{what} {path}: is no JSON object; expected {SCHEMA!r}.", fix=FIX)
    return document


def read_device_report(path: Path) -> dict[str, Any]:
    """Read one ``flowexport.report/1``.

    Raises:
        BundleError: no JSON, another schema, or a key that does not follow it.
    """
    document = read_json(path, "report")
    require_schema(document, SCHEMA, f"report {path}")
    try:
        validate(document, "device_report")
    except BundleError as error:
        raise BundleError(f"report {path}: {error.message}", fix=error.fix) from error
    return document


def require_schema(document: Mapping[str, Any], schema: str, where: str) -> None:
    found = document.get("schema")
    if found != schema:
        raise BundleError(f"{where}: schema is {found!r}; expected {schema!r}.", fix=FIX)


def decode(tensor: Mapping[str, Any]) -> np.ndarray | str:
    """Return a report's tensor, or in words why its data is none."""
    try:
        dtype = np.dtype(tensor["dtype"])
    except TypeError:
        return f"has the unknown dtype {tensor['dtype']!r}"
    if dtype.kind not in "fiub":
        return f"has dtype {dtype.name}; expected numbers"
    try:
        data = base64.b64decode(tensor["data"], validate=True)
    except (binascii.Error, ValueError):
        return "has data that is no base64"
    expected = int(np.prod(tensor["shape"], dtype=np.int64)) * dtype.itemsize
    if len(data) != expected:
        return f"has {len(data)} bytes; expected {expected} of shape {list(tensor['shape'])}"
    values = np.frombuffer(data, dtype.newbyteorder("<"))
    return values.reshape(tensor["shape"]).astype(dtype)


def encode(name: str, value: np.ndarray) -> dict[str, Any]:
    """Return a tensor as a device report holds it."""
    data = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
    return {
        "name": name,
        "dtype": value.dtype.name,
        "shape": list(value.shape),
        "data": base64.b64encode(data).decode("ascii"),
    }
