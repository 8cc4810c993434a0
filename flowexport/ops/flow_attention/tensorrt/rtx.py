"""What TensorRT-RTX's Python packages need before they take plugins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flowexport.core.errors import UnavailableError


def make_rtx_shim(folder: Path) -> Path:
    """Make the folder that lets TensorRT-RTX's parser find its own library.

    With any V3ONE plugin the parser opens the bare name ``libtensorrt_rtx.so``,
    which the wheel does not ship, and the process ends. A symbolic link of
    that name cures it, in a folder that is on ``LD_LIBRARY_PATH`` when the
    process starts.

    Returns:
        ``folder``, made if need be.

    Raises:
        UnavailableError: TensorRT-RTX is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [p for place in places for p in sorted(Path(place).rglob("libtensorrt_rtx.so.*"))]
    if not found:
        raise UnavailableError(
            "plugin: no libtensorrt_rtx.so.* beside the package tensorrt_rtx_libs; expected one.",
            fix="pip install 'flowexport[tensorrt]'",
        )
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libtensorrt_rtx.so"
    if not link.is_symlink() or link.resolve() != found[0].resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(found[0])
    return folder


def builder_environment(
    module: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    start: Path | None = None,
) -> dict[str, str]:
    """Return the environment for a process that builds with the plugin.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        folder: where the link may lie; must outlive the process.
        environment: to start from; this process's own by default.
        start: the process's working folder, where the path is to be relative to it.
    """
    result = dict(os.environ if environment is None else environment)
    if module == "tensorrt_rtx":
        shim = make_rtx_shim(folder)
        first = str(shim) if start is None else os.path.relpath(shim, start)
        paths = [first, result.get("LD_LIBRARY_PATH", "")]
        result["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in paths if p)
    return result
