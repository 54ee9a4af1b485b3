"""A finished folder to the Hugging Face hub, by the hub's own library."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from rlctl_train.config.errors import FAILED, PREFLIGHT, UserError


def check(repo: str) -> str:
    """Return who would push; raises UserError without the library, a token or the network."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        what = "--push needs the package huggingface_hub"
        raise UserError(what, "pip install 'rlctl[hub]'", exit_code=PREFLIGHT) from error
    try:
        return str(HfApi().whoami()["name"])
    except LocalTokenNotFoundError as error:
        remedy = "log in with `hf auth login`, or set HF_TOKEN"
        raise UserError(f"there is no token to push to {repo} with", remedy, exit_code=PREFLIGHT) from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set", "unset it to push", exit_code=PREFLIGHT) from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub does not take the token: {error}", "make a new one", exit_code=PREFLIGHT) from error
    except _unreachable() as error:
        remedy = "see that this machine reaches the hub, or set HF_ENDPOINT to a mirror"
        raise UserError(f"the hub cannot be reached: {error}", remedy, exit_code=PREFLIGHT) from error


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder and return where it lies."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload merged model"))
    except (ValueError, *_unreachable()) as error:
        remedy = f"{folder} is complete: mend it and give the command again, or use `hf upload {repo} {folder}`"
        raise UserError(f"pushing to {repo} failed: {error}", remedy, exit_code=FAILED) from error


def _unreachable() -> tuple[type[Exception], ...]:
    """Return the errors of the HTTP library below the hub's, whose name depends on the hub's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
