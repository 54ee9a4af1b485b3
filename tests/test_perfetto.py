"""A trace is served once, to Perfetto's page alone, from the one address that this page may fetch from."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rlctl.perfetto import TraceServer
from rlctl_train.config.errors import UserError


def test_a_trace_is_served_until_it_was_fetched(tmp_path: Path) -> None:
    path = tmp_path / "actor-0.trace.json.gz"
    path.write_bytes(b"trace")
    server = TraceServer(path, port=0)
    page, _, local = server.address.partition("/#!/?url=")
    thread = threading.Thread(target=server.serve)
    thread.start()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(local.replace("actor-0", "../actor-0"))
    with urllib.request.urlopen(local) as answer:
        assert answer.read() == b"trace"
        assert answer.headers["Access-Control-Allow-Origin"] == page == "https://ui.perfetto.dev"
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_port_that_is_taken_is_named_with_another_way(tmp_path: Path) -> None:
    first = TraceServer(tmp_path / "a", port=0)
    with pytest.raises(UserError, match="is taken") as told:
        TraceServer(tmp_path / "b", port=first._server.server_port)
    assert "drop" in told.value.remedy
    first._server.server_close()
