"""Vendors' commands that are not on the path: their installers put them where login shells find them."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_hw.host import CommandResult, Host

ROCM_FOLDERS = ("/opt/rocm/bin",)
ASCEND_FOLDERS = ("/usr/local/sbin", "/usr/local/bin")


def run_tool(host: Host, argv: Sequence[str], folders: Sequence[str]) -> CommandResult:
    """Run a command from the path, else from the first of the folders that has it."""
    result = host.run(list(argv))
    if result.code is not None:
        return result
    places = [f"{folder}/{argv[0]}" for folder in folders]
    found = next((place for place in places if host.exists(place)), None)
    return host.run([found, *argv[1:]]) if found else result
