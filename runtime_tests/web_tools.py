"""What the web demo's tests share: serving a package, driving the page, damaging a package."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flowexport.demo import Site, open_server
from flowexport.package import Package

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web_demo"
ARTIFACTS = ROOT / ".ci" / "artifacts"
"""Where screenshots, the report and the measured numbers are left."""


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is missing: node 20 or newer with npm builds web_demo")
    return found


@dataclass
class Served:
    """A running demo; `sent` counts the bytes of each answer's body as they went out."""

    url: str
    sent: list[tuple[str, int]] = field(default_factory=list)


@contextlib.contextmanager
def serve(site: Path, package: Path) -> Iterator[Served]:
    # Damaged packages are served on purpose; `flowexport demo` itself refuses them.
    opened = Package.open(package, check_files=False)
    with open_server(Site.make(site, opened), port=0) as server:
        served = Served(f"http://127.0.0.1:{server.port}/")
        handler: Any = server.RequestHandlerClass

        class Counting(handler):
            def send_header(self, keyword: str, value: str) -> None:
                if keyword == "Content-Length":
                    served.sent.append((self.path, int(value)))
                super().send_header(keyword, value)

        server.RequestHandlerClass = Counting
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def drive(scenario: str, url: str, chromium: str, out: Path = ARTIFACTS) -> dict[str, Any]:
    """Run one scenario of web_demo/test/browser/drive.mjs; return what it saw."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [need("node"), "test/browser/drive.mjs", scenario, url, str(out), chromium],
        cwd=WEB,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{scenario}: {done.stderr[-3000:]}"
    return dict(json.loads(done.stdout))


def damage(package: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(package, out)
    return out, json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def put(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def declare(folder: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    """Make the manifest agree with a damaged file, so that only its content is wrong."""
    raw = (folder / entry["path"]).read_bytes()
    entry["sha256"], entry["size_bytes"] = hashlib.sha256(raw).hexdigest(), len(raw)
    manifest["files"][entry["path"]] = {k: entry[k] for k in ("sha256", "size_bytes")}


def verdicts(seen: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(f["model"], f["what"]): f["verdict"] for f in seen["findings"]}


@contextlib.contextmanager
def serve_opened(site: Path, opened: Package) -> Iterator[str]:
    """Serve a package that was sound when it was opened and is not any more."""
    with open_server(Site.make(site, opened), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}/"
        finally:
            server.shutdown()
            thread.join()
