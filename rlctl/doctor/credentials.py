"""Tokens a run will ask for. Only whether they are there is looked at; the hub's own goes to the hub alone."""

from __future__ import annotations

import netrc
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn

OFFLINE = ("offline", "disabled", "local", "dryrun")


def check(case: Case) -> Finding:
    """Look for the tokens of the trackers and of an existing Ray cluster."""
    if case.config is None:
        return skip("tokens", "no run is given")
    env, problems = case.host.env, []
    # A tracker that is not installed is the business of the check `packages`.
    asking = [name for name in case.config.telemetry.trackers if name in ASKING and case.tools.folder(name)]
    for tracker in asking:
        problems += ASKING[tracker](env)
    if case.config.ray.address is not None:
        asking.append("ray.address")
        problems += _ray(env)
    return verdict("tokens", problems, f"asked for by {', '.join(asking)}" if asking else "this run asks for none")


def hub_token(env: Mapping[str, str]) -> str | None:
    """Return the hub's token as its client finds it: the environment, then the file that a login leaves."""
    if token := env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN"):
        return token
    home = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return _text(Path(env.get("HF_TOKEN_PATH") or f"{home}/token").expanduser())


def _wandb(env: Mapping[str, str]) -> Iterator[Problem]:
    if env.get("WANDB_API_KEY") or env.get("WANDB_MODE", "").lower() in OFFLINE:
        return
    host = env.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    if not _in_netrc(_home(env) / ".netrc", host):
        yield fail("telemetry.trackers=wandb: no key is set", "set WANDB_API_KEY, or WANDB_MODE=offline")


def _swanlab(env: Mapping[str, str]) -> Iterator[Problem]:
    if env.get("SWANLAB_API_KEY") or env.get("SWANLAB_MODE", "").lower() in OFFLINE:
        return
    folder = Path(env.get("SWANLAB_SAVE_DIR") or _home(env) / ".swanlab")
    if not (folder / ".netrc").is_file():
        yield fail("telemetry.trackers=swanlab: no key is set", "set SWANLAB_API_KEY, or SWANLAB_MODE=offline")


def _mlflow(env: Mapping[str, str]) -> Iterator[Problem]:
    if not env.get("MLFLOW_TRACKING_URI"):
        what = "telemetry.trackers=mlflow: no server is set, so MLflow writes into the folder of the run's start"
        yield warn(what, "set MLFLOW_TRACKING_URI")


def _ray(env: Mapping[str, str]) -> Iterator[Problem]:
    if env.get("RAY_AUTH_MODE") != "token" or env.get("RAY_AUTH_TOKEN"):
        return
    place = Path(env.get("RAY_AUTH_TOKEN_PATH") or _home(env) / ".ray" / "auth_token")
    if _text(place) is None:
        yield fail("RAY_AUTH_MODE=token, and there is no token", "set RAY_AUTH_TOKEN to that of the cluster")


def _in_netrc(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or "~").expanduser()


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


ASKING = {"wandb": _wandb, "swanlab": _swanlab, "mlflow": _mlflow}
"""Trackers that want a key or an address."""
