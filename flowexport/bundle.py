"""The bundle: a folder that is either complete or not there.

A conversion writes into a hidden sibling, ``.NAME.partial-<pid>``, which one
rename moves into place. A lock beside it keeps two conversions apart, and
tells what a killed one has left behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flowexport.core.errors import BundleError, FlowExportError, OutputError, UnknownNameError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "flowexport.manifest/1"
FULL_DISK_BYTES = 1 << 20
REPORT_FILES = ("report.json", "report.html")

_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.EEXIST: "a part of the path is no folder",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def output_errors(where: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into OutputError.

    Libraries hide a full disk behind errors of their own, so on any error of
    theirs the disk itself is asked.
    """
    try:
        yield
    except FlowExportError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in _REFUSALS and disk_is_full(where):
            number = errno.ENOSPC
        if number not in _REFUSALS:
            raise
        raise cannot_write(where, number) from error


def cannot_write(where: Path, number: int | None) -> OutputError:
    """Return the error for an output folder that the system refuses to write."""
    return OutputError(
        f"output {where}: cannot be written: {_REFUSALS[number or errno.ENOSPC]}.",
        fix="free some space or choose another folder with --out",
    )


def disk_is_full(where: Path) -> bool:
    """Whether the disk that holds ``where``, or would hold it, has no room left."""
    for folder in (where, *where.parents):
        try:
            return shutil.disk_usage(folder).free < FULL_DISK_BYTES
        except OSError:
            continue
    return False


@dataclass(frozen=True)
class Bundle:
    """A finished bundle, opened for reading.

    Attributes:
        path: the folder.
        manifest: the content of ``manifest.json``.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a bundle's manifest.

        Raises:
            BundleError: the path is no folder, or holds no readable manifest.
        """
        fix = "`flowexport convert RECIPE --out DIR` makes a bundle"
        if not path.exists():
            raise BundleError(f"bundle {path}: does not exist; expected a folder.", fix=fix)
        file = path / MANIFEST
        if not path.is_dir() or not file.is_file():
            raise BundleError(
                f"bundle {path}: holds no {MANIFEST}; expected a folder made by flowexport.",
                fix=fix,
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"bundle {file}: cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise BundleError(f"bundle {file}: is no JSON ({error}).", fix=fix) from error
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        if found != MANIFEST_SCHEMA:
            raise BundleError(
                f"bundle {file}: schema is {found!r}; expected {MANIFEST_SCHEMA!r}.", fix=fix
            )
        bundle = cls(path.resolve(), manifest)
        bundle.artifacts()
        return bundle

    def artifacts(self) -> dict[str, Artifact]:
        """Return every artifact of the manifest, whether its file is still there or not.

        Raises:
            BundleError: an entry lacks a key, or points outside the bundle.
        """
        found = {}
        try:
            for name, entry in self.manifest["targets"].items():
                fields = {k: entry[k] for k in Artifact.__dataclass_fields__ if k in entry}
                artifact = Artifact.from_json(fields, self.path)
                if not artifact.path.resolve().is_relative_to(self.path):
                    raise BundleError(
                        f"bundle {self.path}: targets.{name}.path is {entry['path']!r};"
                        " expected a path inside the bundle."
                    )
                found[name] = artifact
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"bundle {self.path / MANIFEST}: targets is incomplete ({error!r})."
            ) from error
        return found

    def select(self, targets: tuple[str, ...]) -> dict[str, Artifact]:
        """Return the artifacts of these targets, or all where none is named."""
        artifacts = self.artifacts()
        for name in targets:
            if name not in artifacts:
                raise UnknownNameError("target", name, artifacts, where=f"bundle {self.path}")
        return {n: a for n, a in artifacts.items() if not targets or n in targets}


def file_table(root: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file under ``root`` but the manifest itself."""
    return {
        path.relative_to(root).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(root.rglob("*"))
        if path.is_file() and path != root / MANIFEST
    }


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file in one step: a reader sees the old one or the new one."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Staging:
    """The hidden folder that becomes the bundle; a context manager.

    Leaving the block without :meth:`commit` removes it and touches nothing else.

    Args:
        out: where the bundle shall be.
        force: replace an older bundle there; never another kind of folder.
        kind: what the folder becomes, in a message's words.
        opener: raises BundleError for a folder that is not of this kind.
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool = False,
        kind: str = "bundle",
        opener: Callable[[Path], object] | None = None,
    ) -> None:
        self.out = out.absolute().resolve()
        self.force = force
        self.kind = kind
        self._open = opener or Bundle.open
        self.path = self._sibling("partial")
        self.failed_log = self.out.with_name(f"{self.out.name}.failed.log")
        self._lock = -1

    def _sibling(self, kind: str) -> Path:
        return self.out.with_name(f".{self.out.name}.{kind}-{os.getpid()}")

    def check(self) -> None:
        """Raise OutputError if ``out`` holds something that must not be lost."""
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir():
            raise OutputError(f"output {self.out}: is a file; expected a new folder.")
        with output_errors(self.out):
            empty = not any(self.out.iterdir())
        if empty:
            return
        if not self.force:
            raise OutputError(
                f"output {self.out}: exists already; expected a new folder.",
                fix="--force replaces it, --out DIR writes elsewhere",
            )
        try:
            self._open(self.out)
        except BundleError as error:
            raise OutputError(
                f"output {self.out}: is no {self.kind}, so --force does not replace it;"
                f" expected a {self.kind} or a new folder.",
                fix="choose another folder with --out",
            ) from error

    def __enter__(self) -> Self:
        self.check()
        with output_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._take_lock()
                self._clean()
                self.check()  # another conversion may have finished while this one waited
                self.path.mkdir()
            except BaseException:
                self._release_lock()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._release_lock()

    def commit(self) -> Path:
        """Move the folder into place and return that place."""
        with output_errors(self.out):
            self.check()
            old = self._sibling("old")
            if self.out.is_dir():
                self.out.rename(old)
            try:
                self.path.rename(self.out)
            except OSError:
                if old.is_dir():
                    old.rename(self.out)
                raise
            shutil.rmtree(old, ignore_errors=True)
            self.failed_log.unlink(missing_ok=True)
        return self.out

    def keep_log(self, log: Path) -> Path | None:
        """Copy a failed conversion's log beside ``out``; None where that is impossible."""
        try:
            shutil.copyfile(log, self.failed_log)
        except OSError:
            return None
        return self.failed_log

    def _clean(self) -> None:
        """Remove what killed conversions left; holding the lock, none of it is in use."""
        for old in self.out.parent.glob(f".{_glob_escape(self.out.name)}.old-*"):
            if os.path.lexists(self.out):
                shutil.rmtree(old, ignore_errors=True)
            else:  # killed between the two renames of commit
                old.rename(self.out)
        for partial in self.out.parent.glob(f".{_glob_escape(self.out.name)}.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)

    @property
    def _lock_file(self) -> Path:
        return self.out.with_name(f".{self.out.name}.lock")

    def _take_lock(self) -> None:
        while True:
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise OutputError(
                    f"output {self.out}: is being written by another conversion"
                    f" (process {owner}); expected a folder of its own.",
                    fix="wait for it, or choose another folder with --out",
                ) from error
            if self._still_there(descriptor):
                break
            os.close(descriptor)  # its owner removed the file between open and flock
        self._lock = descriptor
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())

    def _still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._lock_file.stat())
        except FileNotFoundError:
            return False

    def _release_lock(self) -> None:
        if self._lock >= 0:
            self._lock_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
