"""Sets a runner up: an emulated ARM machine, or an old runtime with packages of its own."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowexport.core.errors import UnavailableError, UnknownNameError
from flowexport.core.folders import cache_dir
from flowexport.core.toolchain import installed_versions
from flowexport.runners.debian import require_debian, unpack

QEMU = "qemu-aarch64"
OLD_TFLITE = "tflite-2.14"
PYTHON_ARM = "3.13"
"""Of the Debian release that :mod:`flowexport.runners.debian` takes the interpreter from."""
OLD_PACKAGES = ("tflite-runtime==2.14.0", "numpy<2")
OLD_PYTHONS = ("3.11", "3.10", "3.9")
"""Versions that tflite-runtime 2.14 has wheels for."""
_ARM_WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_FACTS = "facts.json"


@dataclass(frozen=True)
class Machine:
    """Where a runner's process runs.

    Attributes:
        targets: whose artifacts it runs.
        execution: ``emulated`` or ``native``; see ``RuntimeInfo``.
        command: starts its Python.
        site: folder of its packages.
        details: what a report tells of it.
    """

    name: str
    targets: tuple[str, ...]
    execution: str
    command: tuple[str, ...]
    site: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What a runner would be on this machine.

    Attributes:
        packages: requirements of what runs there.
        folder: in the cache, made on first use.
        available: whether it can be had here.
        fetches: what the first use leaves in the cache, in words.
        reason, fix: where it cannot.
    """

    packages: tuple[str, ...] = ()
    folder: Path | None = None
    available: bool = True
    fetches: str = ""
    reason: str | None = None
    fix: str | None = None

    @property
    def ready(self) -> bool:
        """Whether it was set up before."""
        return self.folder is not None and (self.folder / _FACTS).is_file()


Tell = Callable[[str], None]


def prepare(name: str, tell: Tell = lambda what: None) -> Machine:
    """Return a runner, set up in the cache folder where it is not there yet.

    Args:
        tell: called with what is done next.

    Raises:
        UnknownNameError: no such runner.
        UnavailableError: it cannot be had on this machine, with what mends it.
    """
    if name not in RUNNERS:
        raise UnknownNameError("runner", name, RUNNERS)
    return RUNNERS[name](tell)


def probe(name: str) -> Setup:
    """Say whether a runner can be had here, without fetching or running anything.

    Raises:
        UnknownNameError: no such runner.
    """
    if name not in _SETUPS:
        raise UnknownNameError("runner", name, _SETUPS)
    try:
        setup = _SETUPS[name]()
        if not setup.ready:
            if name == QEMU:
                require_debian(f"runner {name}")
            if find_spec("pip") is None:
                raise UnavailableError(
                    f"runner {name}: pip is not installed in this Python; its packages come by it.",
                    fix="python -m ensurepip",
                )
    except UnavailableError as error:
        return Setup(available=False, reason=error.message, fix=error.fix)
    return setup


def _qemu_setup() -> Setup:
    if platform.machine() in ("aarch64", "arm64"):
        raise UnavailableError(
            f"runner {QEMU}: this machine is {platform.machine()} itself; expected another.",
            fix="flowexport verify BUNDLE",
        )
    if sys.platform != "linux":
        raise UnavailableError(
            f"runner {QEMU}: user-mode emulation needs Linux (this is {sys.platform}).",
            fix="run it in a Linux container",
        )
    versions = installed_versions("onnxruntime", "ai-edge-litert", "numpy")
    packages = tuple(f"{name}=={version}" for name, version in versions.items())
    folder = _folder(QEMU, [PYTHON_ARM, *packages])
    return Setup(packages, folder, fetches="240 MB on disk")


def qemu_aarch64(tell: Tell) -> Machine:
    """Return ONNX Runtime and LiteRT for ARM, of the versions installed here, under qemu."""
    setup = _qemu_setup()

    def build(folder: Path) -> dict[str, Any]:
        tell("qemu and an ARM Python from Debian (95 MB)")
        found = unpack(folder, f"runner {QEMU}", python=PYTHON_ARM)
        tell(f"ARM wheels of {', '.join(setup.packages)}")
        tags = [f"--platform={tag}" for tag in _ARM_WHEELS]
        _install(folder / "site", setup.packages, PYTHON_ARM, tags, QEMU)
        return found

    folder, facts = _cached(setup, build)
    python = folder / "root" / "usr" / "bin" / f"python{PYTHON_ARM}"
    return Machine(
        name=QEMU,
        targets=("onnx", "tflite"),
        execution="emulated",
        command=(str(folder / QEMU), "-L", str(folder / "root"), str(python), "-I", "-S"),
        site=folder / "site",
        environment={"LANG": "C.UTF-8", "PATH": "/usr/bin"},
        details=facts,
    )


def _old_setup() -> Setup:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UnavailableError(
            f"runner {OLD_TFLITE}: tflite-runtime 2.14 has wheels for Linux on x86_64 and aarch64"
            f" (this is {sys.platform} on {platform.machine()}).",
            fix="run it in a Linux container",
        )
    _, version = _old_python()
    folder = _folder(OLD_TFLITE, [version, *OLD_PACKAGES])
    return Setup(OLD_PACKAGES, folder, fetches="75 MB on disk")


def tflite_2_14(tell: Tell) -> Machine:
    """Return tflite-runtime 2.14 with a numpy of its time."""
    setup = _old_setup()
    python, version = _old_python()

    def build(folder: Path) -> dict[str, Any]:
        tell(f"packages {', '.join(OLD_PACKAGES)}")
        tag = f"--platform=manylinux2014_{platform.machine()}"
        _install(folder / "site", OLD_PACKAGES, version, [tag], OLD_TFLITE)
        return {}

    folder, facts = _cached(setup, build)
    return Machine(
        name=OLD_TFLITE,
        targets=("tflite",),
        execution="native",
        command=(python, "-I", "-S"),
        site=folder / "site",
        environment={"LANG": "C.UTF-8", "PATH": os.defpath},
        details=facts,
    )


RUNNERS: Mapping[str, Callable[[Tell], Machine]] = {QEMU: qemu_aarch64, OLD_TFLITE: tflite_2_14}
"""Runner -> what prepares it."""
_SETUPS: Mapping[str, Callable[[], Setup]] = {QEMU: _qemu_setup, OLD_TFLITE: _old_setup}


def _old_python() -> tuple[str, str]:
    own = ".".join(map(str, sys.version_info[:2]))
    if own in OLD_PYTHONS:
        return sys.executable, own
    for version in OLD_PYTHONS:
        found = shutil.which(f"python{version}")
        if found:
            return found, version
    raise UnavailableError(
        f"runner {OLD_TFLITE}: tflite-runtime 2.14 has wheels for Python"
        f" {', '.join(OLD_PYTHONS)}; this is {own}, and none of them is on PATH.",
        fix="install Python 3.11, for example `apt-get install python3.11`",
    )


def _folder(name: str, parts: Sequence[str]) -> Path:
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_dir("runners") / f"{name}-{key}"


def _cached(setup: Setup, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the folder that ``build`` filled for a setup, now or earlier, and its facts."""
    folder = setup.folder
    assert folder is not None
    if not setup.ready:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            facts = build(made)
            (made / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            try:
                made.rename(folder)
            except OSError:  # another process was first
                if not (folder / _FACTS).is_file():
                    raise
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    return folder, facts


def _install(
    site: Path, packages: Sequence[str], python: str, platforms: Sequence[str], runner: str
) -> None:
    """Unpack wheels of another Python or platform into a folder.

    Raises:
        UnavailableError: pip is not there or refused, with its last line.
    """
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"),
        *("--target", str(site), "--only-binary=:all:", "--implementation=cp"),
        *(f"--python-version={python}", *platforms, *packages),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = (errors or done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(
            f"runner {runner}: pip cannot get {', '.join(packages)} for Python {python}:"
            f" {said[:300].rstrip('.')}.",
            fix="`pip --version` must work, and reach the package index",
        )
