"""A Ray head for tests to join: two CPUs, a port and a token of its own."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(log_file: Path) -> Iterator[str]:
    """Give the address of a head whose processes belong to one session and end with it; the token is set meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2"]
    with log_file.open("w") as log:
        head = subprocess.Popen(
            [*command, "--include-dashboard=false", "--block"], stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_until_listening(port, head)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)
            del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]


def _wait_until_listening(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "the Ray head ended early"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the Ray head did not come up")
