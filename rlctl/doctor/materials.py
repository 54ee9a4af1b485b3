"""What a run reads: the model's folder or its place on the hub, the data files, the user's reward functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from rlctl.doctor.case import Case
from rlctl.doctor.credentials import hub_token
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict
from rlctl.doctor.packages import custom_rewards
from rlctl_train.config.data import ParquetData
from rlctl_train.config.model import PretrainedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
PARQUET_MAGIC = b"PAR1"
IMPORT_LIMIT_S = 100.0
"""Less than the limit of the check, so that the file is named."""
HUB, HUB_LIMIT_S = "https://huggingface.co", 8.0
TRUE_WORDS = ("1", "on", "yes", "true")

LOAD_FUNCTION = """
import sys
from rlctl_train.registry import UserCodeError, load_user_object
try:
    found = load_user_object(sys.argv[1])
except UserCodeError as error:
    sys.exit(str(error))
if not callable(found):
    sys.exit(f"{sys.argv[1]} is not a function")
"""


def data(case: Case) -> Finding:
    """Look whether the data files are there and whole."""
    if case.config is None:
        return skip("data", "no run is given")
    found = case.config.data
    if not isinstance(found, ParquetData):
        return skip("data", f"data.type={found.type} is made by the run")
    named = {"data.train": found.train, "data.val": found.val}
    problems = [p for key, value in named.items() if value is not None for p in _data_file(key, value)]
    return verdict("data", problems, ", ".join(value for value in named.values() if value is not None))


def model(case: Case) -> Finding:
    """Look whether the model's files are there, or whether the hub gives them."""
    if case.config is None:
        return skip("model", "no run is given")
    asked = case.config.model
    if not isinstance(asked, PretrainedModel):
        return skip("model", f"model.type={asked.type} is made by the run")
    if is_hub_id(asked.path):
        return verdict("model", _on_the_hub(case, asked), f"{asked.path} is within reach")
    return verdict("model", _model_folder(asked), f"{asked.path} has config, weights and a tokenizer")


def reward(case: Case) -> Finding:
    """Load the user's reward functions, as a grader will."""
    if case.config is None:
        return skip("reward", "no run is given")
    parts = custom_rewards(case.config.reward)
    if not parts:
        return skip("reward", "no reward of the user's own")
    return verdict(
        "reward", [p for part in parts for p in _function(case, part.path)], ", ".join(p.path for p in parts)
    )


def is_hub_id(path: str) -> bool:
    """Say whether a model's path names one on the hub: OWNER/NAME, where no such folder is."""
    return not path.startswith((".", "/", "~")) and path.count("/") == 1 and not Path(path).is_dir()


def hub_cache(env: Mapping[str, str]) -> Path:
    """Return the folder of downloaded models, as the hub's client finds it."""
    if explicit := env.get("HF_HUB_CACHE"):
        return Path(explicit).expanduser()
    base = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(base).expanduser() / "hub"


def is_cached(env: Mapping[str, str], path: str) -> bool:
    """Say whether a snapshot with config and weights is in the cache."""
    snapshots = hub_cache(env) / f"models--{path.replace('/', '--')}" / "snapshots"
    return any((place / "config.json").exists() and any(place.glob("*.safetensors")) for place in snapshots.glob("*"))


def _data_file(key: str, value: str) -> Iterator[Problem]:
    path = Path(value).expanduser()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not path.exists():
        yield fail(f"{key}={value}: there is no such file", "make it with `rlctl data prep`, or correct the path")
    elif not files:
        yield fail(f"{key}={value}: the folder holds no parquet file", "make one with `rlctl data prep`")
    for file in files:
        if file.is_file() and not _is_parquet(file):
            yield fail(f"{key}={file}: this is not a whole parquet file", "make it again with `rlctl data prep`")


def _is_parquet(file: Path) -> bool:
    size = len(PARQUET_MAGIC)
    with file.open("rb") as stream:
        head = stream.read(size)
        stream.seek(0, 2)
        stream.seek(max(stream.tell() - size, 0))
        return head == PARQUET_MAGIC == stream.read(size)


def _model_folder(asked: PretrainedModel) -> Iterator[Problem]:
    folder = Path(asked.path).expanduser()
    if not folder.is_dir():
        yield fail(f"model.path={asked.path}: there is no such folder", "correct the path, or give a hub id OWNER/NAME")
        return
    if not (folder / "config.json").is_file():
        yield fail(f"model.path={asked.path}: the folder has no config.json", "give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        yield fail(f"model.path={asked.path}: the folder has no safetensors file", "give a folder with weights")
    place = Path(asked.tokenizer).expanduser() if asked.tokenizer else folder
    if place.is_dir() and not any((place / name).is_file() for name in TOKENIZER_FILES):
        key = "model.tokenizer" if asked.tokenizer else "model.path"
        yield fail(f"{key}={place}: the folder has no tokenizer", "set model.tokenizer to a folder or hub id with one")


def _on_the_hub(case: Case, asked: PretrainedModel) -> Iterator[Problem]:
    env, named = case.host.env, f"model.path={asked.path}"
    if is_cached(env, asked.path):
        return
    if any(env.get(name, "").lower() in TRUE_WORDS for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        what = f"{named}: not in the cache {hub_cache(env)}, and HF_HUB_OFFLINE forbids to fetch it"
        yield fail(what, "unset HF_HUB_OFFLINE, or give a folder")
        return
    endpoint, token = env.get("HF_ENDPOINT") or HUB, hub_token(env)
    url = f"{endpoint.rstrip('/')}/{quote(asked.path)}/resolve/{quote(asked.revision or 'main', safe='')}/config.json"
    answer = case.tools.http(url, token, HUB_LIMIT_S)
    if answer in (401, 403):
        way_out = "accept its licence on the hub" if token else "set HF_TOKEN, and accept its licence on the hub"
        yield fail(f"{named}: the hub refuses it (status {answer}): gated, private or misspelt", way_out)
    elif answer == 404:
        yield fail(f"{named}: the hub has no such model or revision", "correct the name, or model.revision")
    elif not isinstance(answer, int):
        yield fail(f"{named}: the hub cannot be reached: {answer}", "give a folder, or set HTTPS_PROXY or HF_ENDPOINT")
    elif answer >= 400:
        yield fail(f"{named}: the hub answers with status {answer}", "try again later, or give a folder")


def _function(case: Case, path: str) -> Iterator[Problem]:
    answer = case.tools.python(LOAD_FUNCTION, (path,), IMPORT_LIMIT_S)
    if answer.code is None:
        yield fail(f"reward.path={path} does not import within {IMPORT_LIMIT_S:g} s", "do less at import")
    elif answer.code:
        yield fail(f"reward.path={path}: {answer.error}", "correct the file; the form is FILE.py:FUNCTION")
