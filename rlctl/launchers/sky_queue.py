"""Where a job stands, from what `sky status`, `sky queue` and `sky jobs queue` print as JSON."""

from __future__ import annotations

from typing import Any

from rlctl.launchers import sky_command
from rlctl.launchers.base import JobStatus

QUEUED = ("INIT", "PENDING", "SETTING_UP", "SUBMITTED", "STARTING", "RECOVERING")
RUNNING = ("RUNNING", "CANCELLING")
SUCCEEDED = "SUCCEEDED"


def on_cluster(name: str) -> JobStatus:
    """Return where the last job with the cluster's name stands."""
    queues = sky_command.ask_json("queue", name)
    rows = [row for row in (queues or {}).get(name, []) if row.get("job_name") == name]
    if rows:
        return _standing(max(rows, key=lambda row: row["job_id"])["status"])
    clusters = sky_command.ask_json("status", name)
    if clusters is None:
        return JobStatus("unknown", "SkyPilot does not answer")
    found = [one for one in _records(clusters) if one.get("name") == name]
    if not found or found[0].get("status") == "STOPPED":
        return JobStatus("ended", "its machines are given back")
    return JobStatus("queued" if found[0].get("status") == "INIT" else "unknown", f"cluster {found[0].get('status')}")


def managed(name: str) -> JobStatus:
    """Return where the last managed job of that name stands."""
    jobs = sky_command.ask_json("jobs", "queue", "--all")
    if jobs is None:
        return JobStatus("unknown", "SkyPilot does not answer")
    rows = [row for row in _records(jobs) if row.get("job_name") == name]
    return _standing(max(rows, key=lambda row: row["job_id"])["status"]) if rows else JobStatus("ended")


def cluster(name: str) -> dict[str, Any] | None:
    """Return SkyPilot's record of a cluster, or None."""
    found = [one for one in _records(sky_command.ask_json("status", name)) if one.get("name") == name]
    return found[0] if found else None


def _standing(word: str) -> JobStatus:
    if word in QUEUED:
        return JobStatus("queued", f"SkyPilot: {word}")
    if word in RUNNING:
        return JobStatus("running", f"SkyPilot: {word}")
    return JobStatus("ended", f"SkyPilot: {word}", exit_code=0 if word == SUCCEEDED else None)


def _records(answer: Any) -> list[dict[str, Any]]:
    """Return the rows of a JSON answer, whether it is a list or has one under a name."""
    if isinstance(answer, dict):
        answer = next((value for value in answer.values() if isinstance(value, list)), [])
    return [row for row in answer or [] if isinstance(row, dict)]
