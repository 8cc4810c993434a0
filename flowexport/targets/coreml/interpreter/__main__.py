"""``python -m flowexport.targets.coreml.interpreter``: the MIL operators that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowexport.targets.coreml.interpreter.handlers import CONSTEXPR, HANDLERS


def coverage() -> dict[str, tuple[list[str], list[str]]]:
    """Return by kind of operator the known and the unknown ones of coremltools' registry.

    A kind is the file of coremltools that defines the operator, newest opset last.
    """
    from flowexport.targets.coreml.sdk import quiet

    quiet()
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    known = {*HANDLERS, *CONSTEXPR, "const"}
    kinds: dict[str, tuple[list[str], list[str]]] = {}
    for name, versions in sorted(SSAOpRegistry.core_ops.items()):
        definition = next(iter(versions.values()))
        kind = Path(definition.__module__.replace(".", "/")).name
        kinds.setdefault(kind, ([], []))[0 if name in known else 1].append(name)
    return kinds


def table(kinds: Mapping[str, tuple[list[str], list[str]]]) -> str:
    """Return the coverage as a Markdown table."""
    lines = ["| kind | interpreted | not |", "|---|---|---|"]
    for kind, (known, unknown) in sorted(kinds.items()):
        lines.append(f"| {kind} | {len(known)}: {', '.join(known)} | {', '.join(unknown)} |")
    count = sum(len(k) for k, _ in kinds.values())
    total = count + sum(len(u) for _, u in kinds.values())
    return "\n".join([*lines, "", f"{count} of {total} operators of the ML Program dialect."])


if __name__ == "__main__":
    print(table(coverage()))
