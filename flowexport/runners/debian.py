"""qemu and an ARM Python out of Debian packages, without root and without touching the system.

apt runs with a state of its own in the folder, so it neither reads nor
changes what is installed; the packages are unpacked, not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from flowexport.core.errors import UnavailableError

RELEASE = "trixie"
"""Its qemu is 10; ONNX Runtime crashes under the 7.2 of the release before."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_APT_CONF = """Dir::State "{apt}";
Dir::State::status "{apt}/status";
Dir::Cache "{apt}/cache";
Dir::Etc::sourcelist "{apt}/sources.list";
Dir::Etc::sourceparts "{apt}/none";
Dir::Etc::preferences "{apt}/none";
Dir::Etc::preferencesparts "{apt}/none";
Acquire::Languages "none";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Debug::NoLocking "true";
"""


def unpack(folder: Path, where: str, *, python: str) -> dict[str, Any]:
    """Put ``qemu-aarch64`` and ``root``, an ARM system with Python, into a folder.

    Args:
        where: begins the messages.
        python: version of Python in the release, ``3.13``.

    Returns:
        ``{"qemu": version}``.

    Raises:
        UnavailableError: the system is no Debian, or apt cannot get the packages.
    """
    require_debian(where)
    apt = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial", "none"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()
    mirror, architecture = _mirror(where), _said("dpkg", "--print-architecture")
    (apt / "sources.list").write_text(
        f"deb [arch={architecture},arm64 signed-by={KEYRING}] {mirror} {RELEASE} main\n"
    )
    configuration = apt / "apt.conf"
    configuration.write_text(_APT_CONF.format(apt=apt, architecture=architecture))
    packages = ["qemu-user", *(f"{p}:arm64" for p in _arm_packages(python))]
    for arguments in (
        ("update",),
        ("install", "--yes", "--download-only", "--no-install-recommends", *packages),
    ):
        _apt(configuration, where, *arguments)
    host, root = folder / "host", folder / "root"
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        if package.name.startswith("qemu-user_"):
            _dpkg(where, package, host)
        elif package.name.endswith("_arm64.deb"):
            _dpkg(where, package, root)
    (root / "lib").symlink_to("usr/lib")
    (host / "usr" / "bin" / "qemu-aarch64").rename(folder / "qemu-aarch64")
    version = _said(str(folder / "qemu-aarch64"), "--version").split()[2]
    shutil.rmtree(host)
    shutil.rmtree(apt)
    return {"qemu": version}


def require_debian(where: str) -> None:
    """Raise UnavailableError unless Debian's packages can be fetched and unpacked here."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing or not KEYRING.is_file():
        lacks = ", ".join(missing) or str(KEYRING)
        raise UnavailableError(
            f"{where}: it is set up from Debian's packages, and {lacks} is missing here.",
            fix="run it on Debian 12 or newer, or in a container of it",
        )


def _arm_packages(python: str) -> tuple[str, ...]:
    return f"python{python}-minimal", f"libpython{python}-stdlib", "libstdc++6"


def _mirror(where: str) -> str:
    """Return the Debian archive that this system uses."""
    listed = _said("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)")
    for line in listed.splitlines():
        origin, _, uri = line.partition(" ")
        if origin == "Debian" and "security" not in uri:
            return uri
    raise UnavailableError(
        f"{where}: apt knows no Debian archive here; expected one, with its lists fetched.",
        fix="apt-get update (on Debian 12 or newer)",
    )


def _apt(configuration: Path, where: str, *arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", "--quiet", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"},
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise UnavailableError(
            f"{where}: apt-get {arguments[0]} failed:"
            f" {(said or done.stderr.strip().splitlines() or ['no message'])[0][:300]}",
            fix="check the network; `apt-get update` must work",
        )


def _dpkg(where: str, package: Path, folder: Path) -> None:
    done = subprocess.run(["dpkg-deb", "-x", package, folder], capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(
            f"{where}: {package.name} cannot be unpacked: {done.stderr.strip()[:300]}",
            fix="free some space in the cache folder (600 MB), and try again",
        )


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
