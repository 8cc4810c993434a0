"""flowexport demo: fixed addresses, the headers that threads need, a clean end."""

from __future__ import annotations

import gzip
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_tools import write_bundle
from way_tools import refused, start, stop

from flowexport.demo import DemoServer, Site, find_site, open_server, reachable_url
from flowexport.demo.server import _takes_gzip, is_loopback
from flowexport.package import Package, make_package

PAGE = "<!doctype html><title>demo</title>" + "<p>text</p>" * 100


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def package(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    out = tmp_path_factory.mktemp("package") / "package"
    return Package.open(make_package([bundle], out).path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work") / "dist"
    (folder / "assets").mkdir(parents=True)
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "index.html").write_text(PAGE)
    (folder / "assets" / "app-3f2a9c1b.js").write_text("1;" * 500)
    (folder / "assets" / "app.js").write_text("1;" * 500)
    (folder / "ort.wasm").write_bytes(bytes(5000))
    (folder / "ort.wasm.gz").write_bytes(gzip.compress(bytes(5000), 9))
    (folder / "outside.txt").symlink_to(folder.parent / "secret.txt")
    return folder


@pytest.fixture(scope="module")
def server(site: Path, package: Package) -> Iterator[DemoServer]:
    with open_server(Site.make(site, package), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def ask(
    server: DemoServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    sent = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, headers=sent)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body


def test_the_headers_that_threads_need(server: DemoServer) -> None:
    for path in ("/", "/ort.wasm", "/package/manifest.json", "/nowhere"):
        _, headers, _ = ask(server, path)
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe-inline" not in policy
        assert "'unsafe-eval'" not in policy and "http" not in policy


def test_the_page_and_the_package(server: DemoServer, package: Package) -> None:
    status, headers, body = ask(server, "/")
    assert (status, body.decode()) == (200, PAGE) and headers["content-type"].startswith(
        "text/html"
    )
    status, headers, body = ask(server, "/package/manifest.json")
    assert json.loads(body) == package.manifest and headers["content-type"] == "application/json"
    for name, entry in package.manifest["files"].items():
        status, headers, body = ask(server, f"/package/{name}")
        assert status == 200 and len(body) == entry["size_bytes"]
    assert ask(server, "/ort.wasm")[1]["content-type"] == "application/wasm"
    assert ask(server, "/assets/app.js")[1]["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/%2e%2e/secret.txt", "/assets/../../secret.txt", "/..%2fsecret.txt",
        "/package/../../../etc/passwd", "//etc/passwd", "/outside.txt", "/ort.wasm.gz", "/assets",
        "/assets/", "/package", "/index.html%00", "/\\..\\secret.txt",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server: DemoServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 404 and b"secret" not in body and b"root:" not in body


def test_compression(server: DemoServer) -> None:
    for path, size in (("/", len(PAGE)), ("/ort.wasm", 5000)):
        _, plain, _ = ask(server, path)
        assert "content-encoding" not in plain and plain["vary"] == "Accept-Encoding"
        _, packed, body = ask(server, path, Accept_Encoding="br, gzip;q=0.8")
        assert packed["content-encoding"] == "gzip" and len(gzip.decompress(body)) == size
        assert int(packed["content-length"]) == len(body) < size
        assert packed["etag"] != plain["etag"]
    _, headers, _ = ask(server, "/package/models/fakes/fakes.npz", Accept_Encoding="gzip")
    assert "content-encoding" not in headers, "weights do not shrink"
    assert not _takes_gzip(None) and not _takes_gzip("br") and not _takes_gzip("gzip;q=0")


def test_caching(server: DemoServer) -> None:
    status, headers, _ = ask(server, "/")
    assert headers["cache-control"] == "no-cache"
    status, again, body = ask(server, "/", If_None_Match=headers["etag"])
    assert (status, body) == (304, b"") and again["etag"] == headers["etag"]
    assert ask(server, "/", If_None_Match='"other"')[0] == 200
    assert "immutable" in ask(server, "/assets/app-3f2a9c1b.js")[1]["cache-control"]
    assert ask(server, "/assets/app.js")[1]["cache-control"] == "no-cache"
    assert ask(server, "/package/manifest.json")[1]["cache-control"] == "no-cache"


def test_methods(server: DemoServer) -> None:
    status, headers, body = ask(server, "/", "HEAD")
    assert (status, body) == (200, b"") and int(headers["content-length"]) == len(PAGE)
    assert ask(server, "/", "POST")[0] == 501 and ask(server, "/", "DELETE")[0] == 501


def test_addresses() -> None:
    assert reachable_url(None, 80) == "http://127.0.0.1:80/"
    assert reachable_url("0.0.0.0", 80) != "http://0.0.0.0:80/"
    assert is_loopback(None) and is_loopback("127.0.0.1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.1.2")


def test_a_site_that_was_not_built(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, 2, "npm ci && npm run build", arguments=["demo", bundle, "--site", tmp_path])


def test_bad_input(
    bundle: Path,
    site: Path,
    package: Package,
    server: DemoServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert find_site(site) == site
    common: list[object] = ["--site", site]
    refused(capsys, 2, "does not exist", arguments=["demo", tmp_path / "no", *common])
    taken: list[object] = ["demo", bundle, *common, "--port", server.port]
    refused(capsys, 2, "is taken", "--port 0", arguments=taken)
    strange: list[object] = ["demo", bundle, *common, "--host", "192.0.2.1"]
    refused(capsys, 2, "192.0.2.1", arguments=strange)
    ios = make_package([bundle], tmp_path / "ios", client="ios").path
    refused(capsys, 2, "package for ios", arguments=["demo", ios, *common])


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_ends(
    bundle: Path, package: Package, site: Path, tmp_path: Path, end: signal.Signals
) -> None:
    what = bundle if end is signal.SIGINT else package.path
    env = {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = start("demo", what, "--site", site, "--port", 0, "--json", env=env)
    try:
        text = ""
        assert process.stdout is not None
        while not text.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            text += line
        document = json.loads(text)
        port = int(document["url"].rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/package/manifest.json")
        served = json.loads(connection.getresponse().read())
        assert [m["id"] for m in served["models"]] == document["models"] == ["fakes"]
        process.send_signal(end)
        before = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0 and "stopped." in err and "Traceback" not in err
        assert time.monotonic() - before < 10
        assert list(tmp_path.iterdir()) == [], "the package made for it is gone"
    finally:
        stop(process)


def test_a_code_for_a_phone(bundle: Path, site: Path) -> None:
    pytest.importorskip("segno", reason="the QR code needs flowexport[demo]")
    process = start("demo", bundle, "--site", site, "--port", 0, "--host", "0.0.0.0")
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        assert "http://" in lines[0] and "0.0.0.0" not in lines[0]
        assert any("█" in line or "▀" in line or "▄" in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert "one thread" in err
    finally:
        stop(process)
