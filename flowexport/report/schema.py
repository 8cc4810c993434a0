"""The published JSON Schemas of a bundle's documents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flowexport.core.errors import BundleError, UnknownNameError

FOLDER = Path(__file__).parent / "schemas"
SCHEMAS = ("manifest", "report", "device_report", "merge", "check")


@cache
def load_schema(name: str) -> dict[str, Any]:
    """Return a published schema by its name; raises UnknownNameError."""
    if name not in SCHEMAS:
        raise UnknownNameError("schema", name, SCHEMAS)
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def validate(document: Mapping[str, Any], schema_name: str) -> None:
    """Check a document against a published schema.

    Args:
        schema_name: one of :data:`SCHEMAS`.

    Raises:
        BundleError: names the first wrong key, what it has and what is expected.
    """
    check_document(document, load_schema(schema_name), f"validate {schema_name}")


def check_document(document: Any, schema: Mapping[str, Any], where: str) -> None:
    """Check a document against any schema; ``where`` begins the message of BundleError."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    errors = list(Draft202012Validator(schema).iter_errors(document))
    if errors:
        first = best_match(iter(errors))  # looks into the branches of an anyOf, too
        place = ".".join(str(p) for p in first.absolute_path) or "document"
        message = first.message if len(first.message) < 300 else f"{first.message[:300]}…"
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BundleError(f"{where}: {place} does not follow {schema['$id']}: {message}.{more}")
    infinite = _not_finite(document)
    if infinite is not None:
        raise BundleError(f"{where}: {infinite} is not finite; expected a number or null.")


def _not_finite(value: Any, place: str = "document") -> str | None:
    """Return the place of a NaN or infinity, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    for key, child in children:
        found = _not_finite(child, f"{place}.{key}")
        if found is not None:
            return found
    return None
