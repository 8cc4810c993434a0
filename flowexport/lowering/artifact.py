"""What a finished file stands for, from the program that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowexport.core.hashing import sha256_tree, size_tree
from flowexport.core.types import Artifact, Function, Options
from flowexport.lowering.program import LoweredProgram


def finished(
    target: str,
    path: Path,
    program: LoweredProgram,
    options: Options,
    *,
    form: str,
    fusions: Mapping[str, int],
    toolchain: Mapping[str, str],
    details: Mapping[str, Any],
    functions: Mapping[str, LoweredProgram] | None = None,
    places: Mapping[str, Path] | None = None,
) -> Artifact:
    """Return the artifact of a file or folder that a target wrote.

    Args:
        program: whose ends the main function has.
        functions: the others, by name.
        places: files of functions that have one of their own; the others are in ``path``.
    """
    sha256, size = sha256_tree(path), size_tree(path)
    others = {}
    for name, function in (functions or {}).items():
        own = (places or {}).get(name)
        others[name] = Function(
            path=own or path,
            sha256=sha256_tree(own) if own else sha256,
            size_bytes=size_tree(own) if own else size,
            inputs=function.inputs,
            outputs=function.outputs,
            state=function.state,
        )
    return Artifact(
        target=target,
        path=path,
        sha256=sha256,
        size_bytes=size,
        precision=options.precision,
        model=program.model,
        recipe_sha256=program.recipe_sha256,
        form=form,
        inputs=program.inputs,
        outputs=program.outputs,
        fusions=fusions,
        toolchain=toolchain,
        options=dict(options.extra),
        details=details,
        functions=others,
        entry=program.entry,
    )
