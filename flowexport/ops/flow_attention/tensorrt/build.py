"""Compile the kernel: for NVIDIA GPUs with nvcc, for the host with a C++ compiler.

One source serves both. The CUDA build holds machine code for every compute
capability asked for, so nothing is compiled on the user's GPU; the host build
executes the same blocks, tiles and reductions on the CPU and is what the tests
check against float64.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from flowexport.core import folders
from flowexport.core.errors import InputError, UnavailableError

SOURCE = Path(__file__).with_name("cuda")
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "120")
"""Compute capabilities the kernel is compiled for: 87 is Jetson Orin, 90 is Hopper."""

_HOST_FLAGS = (
    *("-std=c++17", "-O2", "-fopenmp", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wno-unknown-pragmas", "-shared", "-fPIC", "-fvisibility=hidden"),
)
_NVCC_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "0"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
)


def source_hash() -> str:
    """Return the SHA-256 of the kernel's source files, names included."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in (".h", ".cu"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_dir() -> Path:
    """Return the folder of compiled kernels."""
    return folders.cache_dir("kernels")


def _tool(names: Sequence[str | None], what: str, fix: str) -> str:
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise UnavailableError(f"kernel: no {what} on PATH; expected one.", fix=fix)


def nvcc() -> str:
    """Return the path of nvcc.

    Raises:
        UnavailableError: there is none in ``$CUDACXX``, on PATH, in
            ``$CUDA_HOME/bin`` or from the package nvidia-cuda-nvcc.
    """
    home = os.environ.get("CUDA_HOME")
    packaged = [str(p / "bin" / "nvcc") for p in packaged_toolkits()]
    return _tool(
        (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc" if home else None, *packaged),
        "nvcc",
        "pip install 'flowexport[kernel]' (nvcc from PyPI), or install the CUDA toolkit (12.8 or"
        " later) and set CUDACXX",
    )


def packaged_toolkits() -> list[Path]:
    """Return the CUDA toolkits that pip installed: ``site-packages/nvidia/cu13``."""
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return [found for place in places for found in sorted(Path(place).glob("cu[0-9]*"))]


def _host_compiler() -> str:
    return _tool((os.environ.get("CXX"), "g++"), "C++ compiler", "install g++ 12 or later")


def cached_cuda(capability: str | None = None, source: str | None = None) -> Path | None:
    """Return a compiled CUDA library from the cache.

    Args:
        capability: of the GPU that shall run it, as ``"89"``: machine code for
            it or a lower one of its generation, else PTX of a lower one; any
            library where None.
        source: :func:`source_hash` of the kernel; this one's by default.
    """
    best: tuple[int, Path] | None = None
    for path in sorted(cache_dir().glob(f"flow_attention-sm*-{(source or source_hash())[:16]}.so")):
        held = [int(cc) for cc in path.name.split("-")[1].removeprefix("sm").split("_")]
        if capability is None:
            return path
        wanted = int(capability)
        exact = [cc for cc in held if cc <= wanted and cc // 10 == wanted // 10]
        rank = 2 * max(exact) + 1 if exact else 2 * max(held) if max(held) <= wanted else 0
        if rank and (best is None or rank > best[0]):
            best = rank, path
    return best[1] if best else None


def kernel_problem(capability: str | None = None) -> UnavailableError | None:
    """Return why this machine cannot get a kernel for a GPU; None where it can or has one."""
    if cached_cuda(capability) is not None:
        return None
    try:
        nvcc(), _host_compiler()
    except UnavailableError as error:
        return error
    return None


def _compile(command: Sequence[str], output: Path) -> Path:
    """Run a compiler into a temporary name, then move the result: never a half-written file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=".partial-", suffix=output.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        done = subprocess.run([*command, "-o", name], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [
                done.stderr.strip()[-500:]
            ]
            raise UnavailableError(
                f"kernel: {Path(command[0]).name} returned {done.returncode}: {lines[0]}",
                fix="compile with a supported compiler: CUDA 12.8 or later, or g++ 12 or later",
            )
        partial.chmod(0o755)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def build_host(folder: Path | None = None, *, reverse: bool = False, plain: bool = False) -> Path:
    """Compile the host library and return its path; an up-to-date one is kept.

    Args:
        folder: where to put it; the cache by default.
        reverse: run the threads of each phase in reverse order.
        plain: take the path of GPUs without TF32 tensor cores (before 8.0).

    Raises:
        UnavailableError: no C++ compiler, or it refuses the source.
    """
    compiler = _host_compiler()
    order = ("-reverse" if reverse else "") + ("-plain" if plain else "")
    output = (folder or cache_dir()) / f"flow_attention-host{order}-{source_hash()[:16]}.so"
    if output.exists():
        return output
    extra = ["-DFLOWEXPORT_HOST_REVERSE"] if reverse else []
    extra += ["-DFLOWEXPORT_HOST_PLAIN"] if plain else []
    return _compile(
        [compiler, *_HOST_FLAGS, *extra, "-x", "c++", str(SOURCE / "launch.cu")],
        output,
    )


def build_cuda(architectures: Sequence[str] = ARCHITECTURES, folder: Path | None = None) -> Path:
    """Compile the CUDA library for the given compute capabilities and return its path.

    It holds machine code for each and PTX of the highest, links the CUDA
    runtime statically and needs only the driver where it runs.

    Args:
        architectures: compute capabilities without the dot, as ``("80", "90")``.
        folder: where to put it; the cache by default.

    Raises:
        InputError: an architecture that is no number.
        UnavailableError: no nvcc, or it refuses the source or an architecture.
    """
    wanted = sorted(set(architectures), key=lambda cc: (len(cc), cc))
    if not wanted or not all(cc.isdigit() and 2 <= len(cc) <= 3 for cc in wanted):
        raise InputError(
            f"kernel: compute capabilities are {list(architectures)}; expected numbers as 80, 120."
        )
    output = (folder or cache_dir()) / (
        f"flow_attention-sm{'_'.join(wanted)}-{source_hash()[:16]}.so"
    )
    if output.exists():
        return output
    code = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in wanted]
    code.append(f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}")
    compiler = nvcc()
    # The package from PyPI has its libraries in lib and looks for them in lib64.
    libraries = Path(compiler).resolve().parent.parent / "lib"
    return _compile(
        [compiler, *_NVCC_FLAGS, f"-L{libraries}", *code, str(SOURCE / "launch.cu")],
        output,
    )
