"""Calling `sky` as a command of its own environment: its pins and its import of seconds stay out of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlctl import settings
from rlctl_train.config.errors import LAUNCH, UserError

ASK_LIMIT_S = 60.0
"""Longest wait for an answer; a first call also starts SkyPilot's server."""
LOG_CODES = (0, 100, 101, 103)
"""Of `sky logs`: the job succeeded, failed, has not ended, was cancelled; 102 means that there is none."""
INSPECT_LIMIT_S = 90.0
QUIET = {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "SKYPILOT_SUPPRESS_PROGRESS": "1"}
INSTALL = 'install it in an environment of its own: `pipx install "skypilot[aws]"` (or gcp, azure, kubernetes, …)'
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

INSPECT = """
import json, sys
given = json.load(sys.stdin)
import sky
problem = None
try:
    sky.Task.from_yaml_config(given["task"])
except ValueError as error:
    problem = str(error).strip()
print("rlctl " + json.dumps({"problem": problem}), flush=True)
if given["accelerator"] and problem is None:
    from sky import catalog
    name, _, count = given["accelerator"].partition(":")
    found = catalog.list_accelerators(gpus_only=True, name_filter=f"^{name}$", case_sensitive=False,
        quantity_filter=int(count or 1), clouds=given["cloud"] or None, all_regions=False, require_price=False)
    rows = [row for rows in found.values() for row in rows]
    prices = [row.spot_price if given["spot"] else row.price for row in rows]
    prices = [price for price in prices if price is not None and price > 0]
    print("rlctl " + json.dumps({"is_offered": bool(rows), "usd_per_hour": min(prices, default=None)}), flush=True)
"""
"""Run by SkyPilot's own Python: whether it takes the task; then, from its price list, which it may have to download,
whether and at what price there is such a machine."""


@dataclass(frozen=True)
class Verdict:
    """What SkyPilot itself says of a task, without starting anything."""

    problem: str | None = None
    """Why it refuses the task."""
    usd_per_hour: float | None = None
    """Lowest listed price of one such machine; None where it is not known."""
    is_offered: bool | None = None
    """Whether its catalogue has such a machine there; None where it cannot say."""


def find() -> Path | None:
    """Return the command: the one of the person's settings, else the one on the path."""
    asked = settings.load().sky
    if asked is not None:
        return asked.expanduser() if asked.expanduser().is_file() else None
    found = shutil.which("sky")
    return None if found is None else Path(found)


def command() -> Path:
    """Return the command, or refuse with the way to get it."""
    found = find()
    if found is None:
        asked = settings.load().sky
        where = f"{asked} (RLCTL_SKY, or sky in settings.toml)" if asked is not None else "the path"
        raise UserError(f"there is no `sky` command at {where}", INSTALL, exit_code=LAUNCH)
    return found


def python() -> str | None:
    """Return the interpreter that the `sky` command names in its first line."""
    found = find()
    if found is None:
        return None
    with found.open("rb") as file:
        first = file.readline(500).decode("utf-8", errors="replace").strip()
    if not first.startswith("#!"):
        return None
    words = first[2:].split()
    return words[0] if words and Path(words[0]).name.startswith("python") else None


def run(arguments: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
    """Run one command to its end, its output in `log`; raise with the last lines when it fails."""
    with log.open("ab") as file:
        done = subprocess.run(
            [str(command()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment, **QUIET},
        )
    if done.returncode != 0:
        text = ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
        last = [line.strip() for line in text.splitlines() if line.strip()][-4:]
        raise UserError(
            f"`sky {arguments[0]}` failed: {' | '.join(last)}",
            "read the message; `sky check` says which places are set up, `sky status` what is left running",
            exit_code=LAUNCH,
        )


def ask(*arguments: str, limit_s: float = ASK_LIMIT_S, good: Container[int] = (0,)) -> str | None:
    """Return what a command prints, or None when it is missing, takes too long or ends with a code that is not good."""
    found = find()
    if found is None:
        return None
    try:
        done = subprocess.run(
            [str(found), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=limit_s, env={**os.environ, **QUIET},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ANSI.sub("", done.stdout) if done.returncode in good else None


def on_head(cluster: str, line: str) -> bool:
    """Run a line of shell on a cluster's first machine, beside its jobs, and return whether that worked.

    By ssh and not by `sky exec`, whose jobs wait on Slurm until the run has ended.
    """
    places = Path("~/.sky/generated").expanduser()
    config, key = places / "ssh" / cluster, places / "ssh-keys" / f"{cluster}.key"
    if not config.exists():
        ask("status", cluster)  # writes it
    words = [
        "ssh",
        "-F",
        str(config),
        *(["-i", str(key)] if key.exists() else []),
        "-o",
        "BatchMode=yes",
        cluster,
        line,
    ]
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=ASK_LIMIT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def ask_json(*arguments: str) -> Any:
    """Return the JSON a command prints after whatever else it says, or None."""
    text = ask(*arguments, "--output", "json")
    if text is None:
        return None
    starts = [match.start() for match in re.finditer(r"^[\[{]", text, re.MULTILINE)]
    for start in starts:
        try:
            return json.JSONDecoder().raw_decode(text[start:])[0]
        except ValueError:
            continue
    return None


def inspect(task: Mapping[str, Any], *, accelerator: str | None, cloud: str, spot: bool) -> Verdict | None:
    """Have SkyPilot's own Python look at a task, offline; None where there is no SkyPilot."""
    interpreter = python()
    given = {"task": task, "accelerator": accelerator, "cloud": cloud, "spot": spot}
    return None if interpreter is None else _inspect(interpreter, json.dumps(given))


@cache
def _inspect(interpreter: str, given: str) -> Verdict | None:
    environment = {**os.environ, **QUIET}
    process = subprocess.Popen(
        [interpreter, "-c", INSPECT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment,
    )  # fmt: skip
    try:
        text, _ = process.communicate(given, timeout=INSPECT_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()  # the price list did not come; what was said before it stands
    said = [json.loads(line.removeprefix("rlctl ")) for line in text.splitlines() if line.startswith("rlctl {")]
    return Verdict(**{key: value for one in said for key, value in one.items()}) if said else None
