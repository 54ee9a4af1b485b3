"""Hands one trace from this machine to Perfetto's page in a browser, which may fetch from one local address alone."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

from rlctl_train.config.errors import FAILED, UserError

PAGE = "https://ui.perfetto.dev"
HOST, PORT = "127.0.0.1", 9001
"""The address that the page's policy lets it fetch from, as Perfetto's own `open_trace_in_ui` serves it."""


class TraceServer:
    """Serves a file until the page has fetched it."""

    def __init__(self, path: Path, port: int = PORT) -> None:
        self._path, self._fetched = path, False
        try:
            self._server = HTTPServer((HOST, port), self._handler())
        except OSError as error:
            raise UserError(
                f"port {port} of {HOST}, the only one that {PAGE} may fetch from, is taken: {error.strerror}",
                f"end what uses it, or open {PAGE} and drop {path} on it",
                exit_code=FAILED,
            ) from error

    @property
    def address(self) -> str:
        """What to open in a browser on this machine, or on one that forwards the port."""
        return f"{PAGE}/#!/?url=http://{HOST}:{self._server.server_port}/{quote(self._path.name)}"

    def serve(self) -> None:
        """Answer until the file has been fetched."""
        with self._server:
            while not self._fetched:
                self._server.handle_request()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != f"/{quote(server._path.name)}":
                    self.send_error(404)
                    return
                data = server._path.read_bytes()
                self.send_response(200)
                self.send_header("Access-Control-Allow-Origin", PAGE)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                server._fetched = True

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: the person was told what to open."""

        return Handler
