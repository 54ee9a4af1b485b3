"""The dashboard of a Ray cluster, by its documented HTTP interface: no Ray is needed on this side."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlctl_train.config.errors import LAUNCH, USAGE, UserError

TIMEOUT_S = 10.0
UPLOAD_TIMEOUT_S = 120.0
DENIED = (401, 403)


class NoAnswer(Exception):
    """The dashboard cannot be reached, or answers something that is not its own."""


class Missing(Exception):
    """The dashboard does not know what it was asked for."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses to carry the token elsewhere."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Follow nothing."""


@dataclass(frozen=True)
class Dashboard:
    """One cluster's dashboard."""

    url: str

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that are alive."""
        found = self._json("GET", "/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]

    def has_package(self, name: str) -> bool:
        """Return whether an uploaded folder of that name is there."""
        try:
            self._ask("GET", f"/api/packages/gcs/{name}")
        except Missing:
            return False
        return True

    def upload(self, name: str, data: bytes) -> None:
        """Hand over a folder as a zip archive."""
        self._ask("PUT", f"/api/packages/gcs/{name}", data, timeout_s=UPLOAD_TIMEOUT_S)

    def submit(self, request: Mapping[str, Any]) -> None:
        """Submit a job."""
        self._json("POST", "/api/jobs/", request, timeout_s=UPLOAD_TIMEOUT_S)

    def job(self, job_id: str) -> dict[str, Any]:
        """Return what the cluster knows of a job."""
        return self._json("GET", f"/api/jobs/{job_id}")

    def log(self, job_id: str) -> str:
        """Return all that a job has printed."""
        return self._json("GET", f"/api/jobs/{job_id}/logs", timeout_s=UPLOAD_TIMEOUT_S)["logs"]

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to a job, and SIGKILL once its time for saving is over."""
        self._json("POST", f"/api/jobs/{job_id}/stop")

    def _json(self, verb: str, path: str, data: Any = None, *, timeout_s: float = TIMEOUT_S) -> Any:
        body = None if data is None else json.dumps(data).encode()
        try:
            return json.loads(self._ask(verb, path, body, timeout_s=timeout_s))
        except ValueError as error:
            raise NoAnswer(f"{self.url}{path} does not answer like Ray's dashboard") from error

    def _ask(self, verb: str, path: str, body: bytes | None = None, *, timeout_s: float = TIMEOUT_S) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.url + path, body, headers | _authorization(os.environ), method=verb)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise Missing(path) from error
            if error.code in DENIED:
                raise UserError(
                    f"the Ray cluster at {self.url} wants another token",
                    "set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's",
                    exit_code=LAUNCH,
                ) from error
            said = error.read().decode(errors="replace").strip().splitlines() or [error.reason]
            raise NoAnswer(f"{self.url}{path} answers {error.code}: {said[-1]}") from error
        except OSError as error:
            raise NoAnswer(f"{self.url} does not answer: {getattr(error, 'reason', error)}") from error


def dashboard_at(address: str) -> Dashboard:
    """Return the dashboard at an address such as http://HOST:8265; raises UserError."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"launch.address={address} is not the address of a dashboard",
            "give the dashboard's, such as --ray http://127.0.0.1:8265",
            exit_code=USAGE,
        )
    return Dashboard(address.rstrip("/"))


def unreachable(error: Exception) -> UserError:
    """Return what a person can do about a dashboard that does not answer."""
    return UserError(
        str(error),
        "check launch.address (--ray), and that the cluster was started with its dashboard (ray[default])",
        exit_code=LAUNCH,
    )


def _authorization(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the header with the token, found where Ray itself looks for it."""
    if environ.get("RAY_AUTH_MODE") == "disabled":
        return {}
    token = environ.get("RAY_AUTH_TOKEN")
    if not token:
        file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        token = file.read_text().strip() if file.is_file() else ""
    return {"Authorization": f"Bearer {token}"} if token else {}
