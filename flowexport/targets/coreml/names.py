"""Short names for a finished program's values, and the table of the modules they came from.

coremltools writes one ``const`` an argument (an axis, an ε, a flag), under a name built from
its reader's, and every name three times and more: in a small model they outweigh a tenth of
its 8-bit weights. Here equal constants become one, and a value is called by its number; what
its operator is, the file says anyway, and which module it came from, the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np

CONSTANT, VALUE = "c", "t"
"""First letters of the names; a number to base 36 follows."""

Renamed = Mapping[str, Mapping[str, str]]


def shorten(spec: Any) -> dict[str, dict[str, str]]:
    """Share equal constants and number all values, in the order in which they are computed.

    The operators, their order and their numbers stay; so do the names of a function's inputs,
    outputs and states. Constants are equal where type and bytes (or the place in the weights'
    file) are.

    Args:
        spec: the package's ``Model``; changed.

    Returns:
        By function: name in the file by coremltools' name, of every value.
    """
    renamed = {}
    for name, function in spec.mlProgram.functions.items():
        block = function.block_specializations[function.opset]
        names = _names(block, {i.name for i in function.inputs} | set(block.outputs))
        renamed[name] = names
        _rename(block, names)
    return renamed


def _names(block: Any, fixed: set[str]) -> dict[str, str]:
    results = [(op, o.name) for op in block.operations for o in op.outputs]
    if any(op.blocks for op in block.operations):
        # Inner blocks read outer names; no program of ours has any.
        return {name: name for _, name in results}
    names: dict[str, str] = {}
    shared: dict[bytes, str] = {}
    free = {letter: _numbered(letter, fixed) for letter in (CONSTANT, VALUE)}
    for op, old in results:
        if old in fixed:
            names[old] = old
        elif op.type == "const":
            value = op.attributes["val"].SerializeToString(deterministic=True)
            names[old] = shared[value] = shared.get(value) or next(free[CONSTANT])
        else:
            stored = op.type.startswith("constexpr_")
            names[old] = next(free[CONSTANT if stored else VALUE])
    return names


def _numbered(letter: str, taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = letter + np.base_repr(number, 36).lower()
        if name not in taken:
            yield name
        number += 1


def _rename(block: Any, names: Mapping[str, str]) -> None:
    """Write the new names; of constants that share one, the first stays."""
    kept: list[Any] = []
    there: set[str] = set()
    for op in block.operations:
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.name:
                    binding.name = names.get(binding.name, binding.name)
        for result in op.outputs:
            result.name = names[result.name]
        if op.type == "const" and op.outputs[0].name in there:
            continue
        there.update(o.name for o in op.outputs)
        if op.outputs and "name" in op.attributes:
            # coremltools writes it too; nothing says whether Core ML wants one.
            op.attributes["name"].immediateValue.tensor.strings.values[0] = op.outputs[0].name
        kept.append(op)
    copies = [type(op).FromString(op.SerializeToString()) for op in kept]
    del block.operations[:]
    block.operations.extend(copies)


def table(functions: Renamed, renamed: Renamed) -> dict[str, dict[str, str]]:
    """Return by function and module path the values that came from it: ``t0-t4 t9 logits``.

    Args:
        functions: module path by coremltools' name of a value; the function of a package
            that has one alone may be called anything.
        renamed: of :func:`shorten`.
    """
    found: dict[str, dict[str, str]] = {}
    for function, paths in functions.items():
        names = renamed[function if function in renamed else "main"]
        by_path: dict[str, list[str]] = {}
        for old, name in names.items():
            if old in paths:
                by_path.setdefault(paths[old], []).append(name)
        found[function] = {path: _fold(by_path[path]) for path in sorted(by_path)}
    return found


def _fold(names: Iterable[str]) -> str:
    """Write names with runs of numbers as their first and last."""
    parts = []
    runs = groupby(enumerate(names), key=lambda pair: _before(pair[1], pair[0]))
    for _, run in runs:
        first, *rest = [name for _, name in run]
        parts.append(f"{first}-{rest[-1]}" if rest else first)
    return " ".join(parts)


def _before(name: str, place: int) -> object:
    """Return what the names of one run have in common."""
    return name if (number := _number(name)) is None else number - place


def _number(name: str) -> int | None:
    found = re.fullmatch(f"{VALUE}(0|[1-9a-z][0-9a-z]*)", name)
    return int(found[1], 36) if found else None


def unfold(text: str) -> Iterator[str]:
    """Yield the names that one entry of :func:`table` means."""
    for part in text.split():
        first, _, last = part.partition("-")
        if not last:
            yield first
            continue
        low, high = (int(name.removeprefix(VALUE), 36) for name in (first, last))
        yield from (VALUE + np.base_repr(n, 36).lower() for n in range(low, high + 1))
