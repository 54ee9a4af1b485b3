"""Versions of Ascend's driver, firmware and CANN, from the files that their installers leave."""

from __future__ import annotations

from collections.abc import Iterable

from rlctl_hw.host import Host
from rlctl_hw.types import Fact

MANAGER = "/dev/davinci_manager"
INSTALL_RECORD = "/etc/ascend_install.info"
DEFAULT_HOME = "/usr/local/Ascend"
CANN_RECORD = "*-linux/ascend_toolkit_install.info"
CANN_HOMES = ("cann", "ascend-toolkit/latest", "nnae/latest")
"""Below the installation: since CANN 8.5, before it, and the runtime without the compilers."""


def read_versions(host: Host) -> dict[str, Fact]:
    """Return what is installed; each is None with the file that should have told."""
    recorded = parse_record(host.read(INSTALL_RECORD) or "")
    home = recorded.get("Driver_Install_Path_Param") or DEFAULT_HOME
    return {
        "ascend.driver": _driver(host, f"{home}/driver/version.info"),
        "ascend.firmware": _version(host, [f"{home}/firmware/version.info"], "Version")
        or Fact(None, home, "not recorded here"),
        "ascend.cann": _version(host, _cann_records(host, home), "version")
        or Fact(None, home, "CANN is not installed here"),
    }


def parse_record(text: str) -> dict[str, str]:
    """Read `key=value` lines of version.info and of an install.info."""
    found = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and key.strip() and value.strip():
            found.setdefault(key.strip(), value.strip())
    return found


def _cann_records(host: Host, home: str) -> list[str]:
    # The environment script of the CANN in use names its folder; it goes before what else is installed.
    used = [host.env[name] for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if host.env.get(name)]
    homes = [*used, *(f"{home}/{folder}" for folder in CANN_HOMES)]
    found = [path for folder in homes for path in host.glob(f"{folder}/{CANN_RECORD}")]
    return [*found, *(f"{folder}/ascend_nnae_install.info" for folder in homes)]


def _driver(host: Host, file: str) -> Fact:
    if known := _version(host, [file], "Version"):
        return known
    if host.exists(MANAGER):
        # A container has the device files without the installation.
        return Fact("loaded", MANAGER, f"{file} does not tell the version")
    return Fact(None, file, "the driver is not installed here")


def _version(host: Host, files: Iterable[str], key: str) -> Fact | None:
    for file in files:
        version = parse_record(host.read(file) or "").get(key)
        if version:
            return Fact(version, file)
    return None
