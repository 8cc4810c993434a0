"""``flowexport demo``: the web demo with one's own models."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowexport.cli import options
from flowexport.cli.console import complain, print_json
from flowexport.core.errors import InputError

if TYPE_CHECKING:
    from flowexport.package import Package

NO_SECURE_CONTEXT = (
    "note: browsers give threads, WebGPU and offline use to https and loopback only;"
    " over this address the page runs with one thread and says so."
)


def demo(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", help="Bundles, or one finished package."),
    ],
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, metavar="N", help="0 takes a free one [8017]."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="ADDR", help="For phones in the same network: 0.0.0.0."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option("--site", metavar="DIR", help="The built page [web_demo/dist]."),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Package bundles and serve the web demo on this machine until Ctrl-C."""
    from flowexport.demo import Site, find_site, open_server, reachable_url
    from flowexport.demo.server import is_loopback

    folder = find_site(site)
    with tempfile.TemporaryDirectory(prefix="flowexport-demo-") as work:
        package = _package(bundles, Path(work) / "package")
        with open_server(
            Site.make(folder, package), host=host, port=port, verbose=verbose
        ) as server:
            try:
                if not is_loopback(host):
                    complain(NO_SECURE_CONTEXT)
                _announce(package, reachable_url(host, server.port), host, json)
                server.serve_forever(poll_interval=0.1)
            except KeyboardInterrupt:
                complain("stopped.")
    return 0


def _announce(package: Package, url: str, host: str | None, json: bool) -> None:
    models = [m["id"] for m in package.manifest["models"]]
    if json:
        print_json({"url": url, "package_sha256": package.sha256, "models": models})
    else:
        print(f"{', '.join(models)}: {url}\nCtrl-C stops it.")
        if host is not None:
            _print_code(url)
    sys.stdout.flush()  # who reads a pipe waits for the address


def _package(paths: list[Path], out: Path) -> Package:
    from flowexport.package import SCHEMA, Package, make_package

    if len(paths) == 1 and _schema(paths[0]) == SCHEMA:
        package = Package.open(paths[0])
        if package.manifest["client"] != "web":
            raise InputError(
                f"demo {paths[0]}: is a package for {package.manifest['client']}; expected web.",
                fix="flowexport package BUNDLE --client web --out DIR",
            )
        return package
    return Package.open(make_package(paths, out).path, check_files=False)


def _schema(path: Path) -> object:
    import json

    try:
        document = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # opening it as a bundle says what is wrong
    return document.get("schema") if isinstance(document, dict) else None


def _print_code(url: str) -> None:
    try:
        import segno
    except ImportError:
        complain("note: no QR code without segno. Fix: pip install 'flowexport[demo]'")
        return
    segno.make(url, error="m").terminal(compact=True)
