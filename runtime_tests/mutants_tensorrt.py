"""Damage to an engine and its layer table, where no GPU runs it.

The engine's own bytes are changed and the layer table's hash of them is mended,
so that the weights' values have to tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import numpy as np
from mutants import WEIGHT_DAMAGES, Damage, Mutant

from flowexport.core.hashing import sha256_file
from flowexport.targets.tensorrt.convert import sidecar_path

FORMAT = "tensorrt"
SKIPPED = ("as stored",)


def _table(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sidecar_path(path).read_text())
    return found


def _write_table(path: Path, table: dict[str, Any]) -> None:
    sidecar_path(path).write_text(json.dumps(table))


def _weight(role: str, damage: Damage, path: Path) -> None:
    table = _table(path)
    content = bytearray(path.read_bytes())
    tensors, places = {}, {}
    for entry in table["weights"]:
        if entry["dtype"] != "float32" or entry["offset"] is None:
            continue
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(bytes(content), np.float32, count, entry["offset"])
        tensors[entry["name"]] = values.reshape(entry["shape"])
        places[entry["name"]] = entry["offset"]
    name = mutants.roles(tensors)[role]
    values = damage(tensors[name]).astype(np.float32).tobytes()
    content[places[name] : places[name] + len(values)] = values
    path.write_bytes(content)
    table["engine_sha256"] = sha256_file(path)
    _write_table(path, table)


def _edit(change: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Change the layer table; a byte is appended to the engine, which the table then names."""
    table = _table(path)
    change(table)
    path.write_bytes(path.read_bytes() + b"\0")
    table["engine_sha256"] = sha256_file(path)
    _write_table(path, table)


def _layer(table: dict[str, Any]) -> None:
    table["layers"][0]["type"] = "plugin"


def _drop_layer(table: dict[str, Any]) -> None:
    table["layers"].pop()


def _set(key: str, value: Any, table: dict[str, Any]) -> None:
    table[key] = value


def mutants_of() -> list[Mutant]:
    """Return the format's mutants."""
    found = [
        Mutant(FORMAT, kind, name, partial(_weight, role, damage))
        for name, (kind, role, damage) in WEIGHT_DAMAGES.items()
    ]

    def add(kind: str, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        found.append(Mutant(FORMAT, kind, name, partial(_edit, change)))

    add("operator replaced", "a layer's type", _layer)
    add("operator replaced", "a layer lost", _drop_layer)
    add("operator replaced", "a plugin too many", partial(_set, "fusions", {"FlowAttention": 3}))

    def tell(key: str, value: Any, table: dict[str, Any]) -> None:
        table["metadata"][key] = value

    labels = [f"speaker {i}" for i in (2, 3, 4, 5, 6, 7, 8, 9, 1)]
    add("labels shifted", "by one", partial(tell, "labels", labels))
    for key, value in (
        ("model", "other"),
        ("recipe_sha256", "0" * 64),
        ("precision", "fp16"),
        ("preprocessing", {"scale": 1.0}),
    ):
        add("metadata of another model", key, partial(tell, key, value))
    profiles = [{"x": [[1, 29, 12]] * 3}]
    add("metadata of another model", "profiles", partial(_set, "profiles", profiles))
    generation = partial(_set, "compute_capabilities", ["7.5"])
    add("metadata of another model", "GPU generation", generation)
    return found
