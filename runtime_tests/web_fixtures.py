"""The web demo's tests, a pytest plugin: Chromium, the built page, bundles and their package.

FLOWEXPORT_WEB_BUNDLES names a folder with the recipes' bundles to use instead of converting them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from once import once, session_folder
from web_tools import ARTIFACTS, WEB, need

import flowexport
from flowexport.demo import find_site
from flowexport.package import make_package
from flowexport.registry import TARGETS

RECIPES = ("digits", "japanese-vowels", "japanese-vowels-streaming")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> str:
    with FileLock(session_folder(tmp_path_factory) / "chromium.lock"):  # one may install
        return _chromium()


def _chromium() -> str:
    for name in CHROMIUM:
        if found := shutil.which(name):
            return found
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(
            "Chromium is missing, and it is not for this user to install: apt-get install chromium"
        )
    commands = [
        ["apt-get", "update", "-qq"],
        [
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            "chromium",
            "fonts-dejavu-core",
        ],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(
                f"Chromium is missing, and {' '.join(command)} failed: {done.stderr[-300:]}"
            )
    return str(shutil.which("chromium"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm = need("npm")
    need("node")

    def build(folder: Path) -> None:
        for arguments in (["ci", "--no-audit", "--no-fund"], ["run", "build"]):
            done = subprocess.run(
                [npm, *arguments], cwd=WEB, capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, f"npm {' '.join(arguments)}: {done.stdout}{done.stderr}"

    once(session_folder(tmp_path_factory), "web-site", build)
    return find_site(None)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    given = os.environ.get("FLOWEXPORT_WEB_BUNDLES")
    if given:
        return [Path(given) / name for name in RECIPES]
    for name in ("onnx", "tflite"):
        availability = TARGETS.get(name).probe()
        if not availability.converts:
            pytest.skip(f"target {name} is not available: {availability.reason}")

    def convert(folder: Path) -> None:
        for name in RECIPES:
            flowexport.convert(
                name, targets=["onnx", "tflite"], out=folder / name, threads=1, bench=False
            )

    out = once(session_folder(tmp_path_factory), "web-bundles", convert)
    return [out / name for name in RECIPES]


@pytest.fixture(scope="session")
def package(bundles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(bundles, tmp_path_factory.mktemp("package") / "web", client="web").path


@pytest.fixture(scope="session")
def measured() -> Iterator[dict[str, Any]]:
    """Collect what the goals are about; written to .ci/artifacts/web_demo.json."""
    numbers: dict[str, Any] = {}
    yield numbers
    if numbers:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(numbers, indent=1, sort_keys=True)
        (ARTIFACTS / "web_demo.json").write_text(text, encoding="utf-8")
