"""A small HTTP server of fixed addresses for the demo; GET and HEAD only."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from flowexport import __version__
from flowexport.core.errors import InputError
from flowexport.demo.site import Page, Site

DEFAULT_PORT = 8017
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self';"
    " style-src 'self'; img-src 'self' data: blob:; font-src 'self'; connect-src 'self';"
    " manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    # Both together give SharedArrayBuffer, without which wasm has one thread.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"flowexport/{__version__}"
    sys_version = ""
    timeout = 60
    server: DemoServer

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _answer(self, *, body: bool) -> None:
        page = self.server.site.pages.get(unquote(urlsplit(self.path).path))
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            packed = page.read_gzip() if _takes_gzip(self.headers.get("Accept-Encoding")) else None
            tag = f'"{page.sha256[:32]}{"-gzip" if packed is not None else ""}"'
            known = {t.strip() for t in (self.headers.get("If-None-Match") or "").split(",")}
            if tag in known:
                self._head(HTTPStatus.NOT_MODIFIED, page, tag)
                return
            data = page.read() if packed is None else packed
        except OSError:  # the file went away under the server
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._head(HTTPStatus.OK, page, tag, data, packed is not None)
        if body:
            self.wfile.write(data)

    def _head(
        self,
        status: HTTPStatus,
        page: Page,
        tag: str,
        data: bytes | None = None,
        packed: bool = False,
    ) -> None:
        self.send_response(status)
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", page.cache_control)
        self.send_header("Vary", "Accept-Encoding")
        if data is not None:
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(data)))
            if packed:
                self.send_header("Content-Encoding", "gzip")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        if self.server.verbose:
            print(f"{self.address_string()} {format % args}", file=sys.stderr)


class DemoServer(ThreadingHTTPServer):
    """Serves a :class:`Site`; a context manager; ``serve_forever`` blocks."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], site: Site, *, verbose: bool = False) -> None:
        self.site = site
        self.verbose = verbose
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over clients that hang up; anything else is a bug and is printed."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


def open_server(
    site: Site, *, host: str | None = None, port: int | None = None, verbose: bool = False
) -> DemoServer:
    """Bind a server.

    Args:
        host: address of this machine to listen on; None: loopback only.
        port: 0 takes a free one; None: 8017, or a free one where that is taken.

    Raises:
        InputError: the address is none of this machine's, or the port is taken.
    """
    try:
        return DemoServer(
            (host or "127.0.0.1", DEFAULT_PORT if port is None else port), site, verbose=verbose
        )
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return open_server(site, host=host, port=0, verbose=verbose)
        strange = f"host {host!r} is no address of this machine"
        reasons = {
            errno.EADDRINUSE: f"port {port} is taken",
            errno.EACCES: f"port {port} needs an administrator",
        }
        raise InputError(
            f"demo: {reasons.get(error.errno or 0, strange)};"
            " expected an address and a port to listen on.",
            fix="--port 0 takes a free port; --host 0.0.0.0 listens on every address",
        ) from error


def reachable_url(host: str | None, port: int) -> str:
    """Return the address that a browser opens; for 0.0.0.0, this machine's own in the network."""
    name = host or "127.0.0.1"
    if name == "0.0.0.0":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing; asks which address would be used
                name = probe.getsockname()[0]
            except OSError:
                name = socket.gethostname()
    return f"http://{name}:{port}/"


def is_loopback(host: str | None) -> bool:
    """Whether browsers take the address for a secure context."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _takes_gzip(accepted: str | None) -> bool:
    """Read Accept-Encoding; ``gzip;q=0`` is a refusal."""
    for part in (accepted or "").split(","):
        name, _, quality = part.partition(";")
        if name.strip().lower() in ("gzip", "*"):
            value = quality.strip().lower().removeprefix("q=")
            return value not in ("0", "0.0", "0.00", "0.000")
    return False
