"""A wheel holds every file that the installed package reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.version import Version  # pytest needs it

ROOT = Path(__file__).parent.parent
FOLDERS = {"flowexport": "flowexport", "models": "flowexport_models"}
SKIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "bin")


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    # Asked of the metadata: setuptools cannot be imported where a test imported distutils before.
    found = [d.version for d in distributions(name="setuptools")]
    if not found or Version(found[0]) < Version("77"):
        pytest.skip(f"setuptools >= 77 builds the wheel; found {found or 'none'}")
    source = tmp_path / "source"
    for folder in (*FOLDERS, "export_recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=SKIPPED)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = ["wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(source / folder).as_posix(): name
        for folder, name in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file() and "build" not in path.parts
    }
    assert "report/schemas/merge.json" in wanted and "report/templates/report.css" in wanted
    missing = [f"{name}/{path}" for path, name in wanted.items() if f"{name}/{path}" not in held]
    assert not missing, "\n".join(missing)
