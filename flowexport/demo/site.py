"""What the demo serves: a table of addresses made once, so that no other file can be asked for."""

from __future__ import annotations

import gzip
import mimetypes
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from flowexport.core.errors import InputError
from flowexport.core.hashing import sha256_file
from flowexport.package import Package

SITE = Path(__file__).parents[2] / "web_demo" / "dist"
"""Where `npm run build` leaves the page in a checkout."""

BUILD = "cd web_demo && npm ci && npm run build"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".bin": "application/octet-stream",
    ".onnx": "application/octet-stream",
    ".tflite": "application/octet-stream",
}
COMPRESSED = {
    ".html",
    ".js",
    ".mjs",
    ".css",
    ".json",
    ".webmanifest",
    ".wasm",
    ".svg",
    ".txt",
    ".bin",
}
"""Models are left out: float weights shrink by a tenth at most."""

HASHED = re.compile(r"[-.][A-Za-z0-9_-]{8,}\.[A-Za-z0-9]+$")
"""A bundler's file name that changes with the content, below /assets/."""


@dataclass
class Page:
    """One address: its file, and the same bytes compressed once they were asked for."""

    path: Path
    address: str
    sha256: str
    packed: Path | None = None
    _gzip: bytes | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def content_type(self) -> str:
        suffix = self.path.suffix.lower()
        guess = mimetypes.guess_type(self.path.name)[0]
        return TYPES.get(suffix) or guess or "application/octet-stream"

    @property
    def cache_control(self) -> str:
        """Return a year for a name that holds a hash, else a question each time."""
        hashed = self.address.startswith("/assets/") and HASHED.search(self.path.name)
        return "public, max-age=31536000, immutable" if hashed else "no-cache"

    def read(self) -> bytes:
        return self.path.read_bytes()

    def read_gzip(self) -> bytes | None:
        """Return the compressed bytes, or None for what does not shrink."""
        if self.path.suffix.lower() not in COMPRESSED:
            return None
        with self._lock:
            if self._gzip is None:
                plain = self.read
                self._gzip = self.packed.read_bytes() if self.packed else gzip.compress(plain(), 6)
            return self._gzip


@dataclass(frozen=True)
class Site:
    """All addresses of the demo."""

    pages: dict[str, Page]

    @classmethod
    def make(cls, site: Path, package: Package) -> Site:
        """Collect the page's files under ``/`` and the package's under ``/package/``."""
        pages = {}
        root = site.resolve()
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = path.relative_to(root).as_posix()
            packed = path.with_name(path.name + ".gz")
            is_packed = path.suffix == ".gz" and path.with_suffix("").is_file()
            if not is_packed and path.resolve().is_relative_to(root):
                pages[f"/{name}"] = Page(
                    path, f"/{name}", sha256_file(path), packed if packed.is_file() else None
                )
        pages["/"] = pages["/index.html"]
        table = {n: e["sha256"] for n, e in package.manifest["files"].items()}
        for name, sha256 in {**table, "manifest.json": package.sha256}.items():
            address = f"/package/{name}"
            pages[address] = Page(package.path / name, address, sha256)
        return cls(pages)


def find_site(path: Path | None = None) -> Path:
    """Return the folder of the built page.

    Args:
        path: a folder of the user's; None: ``web_demo/dist`` of the checkout.

    Raises:
        InputError: it was not built yet.
    """
    site = SITE if path is None else path
    if not (site / "index.html").is_file():
        raise InputError(
            f"demo: {site} holds no index.html; expected the built web demo.",
            fix=BUILD if path is None else f"{BUILD}, or leave --site away",
        )
    return site
