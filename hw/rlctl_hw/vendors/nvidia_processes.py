"""Which processes hold memory of NVIDIA GPUs, as `nvidia-smi` lists them; those outside a container are not listed."""

from __future__ import annotations

import csv

from rlctl_hw.host import Host

QUERY = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader")


def read(host: Host) -> dict[str, tuple[str, ...]]:
    """Return the processes of each GPU by its UUID, as `name (pid)`."""
    return parse(host.run(QUERY).stdout)


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Read the rows of the query; messages and half rows are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 3 and row[0].startswith(("GPU-", "MIG-")) and row[1].isdigit():
            uuid, pid, name = row
            found[uuid] = (*found.get(uuid, ()), f"{name.strip().rsplit('/', 1)[-1]} ({pid})")
    return found
