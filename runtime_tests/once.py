"""What is made once a test session, whichever process of it comes first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock  # torch needs it


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder that all processes of this test session share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Return ``base/name``, filled by the first that asks; read only.

    Args:
        base: :func:`session_folder`.
    """
    folder = base / name
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder
