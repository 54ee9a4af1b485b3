"""What can be known to fail before anything starts: missing packages, files, models, functions, disk space."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rlctl_train.config import RunConfig
from rlctl_train.config.data import ParquetData
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.model import PretrainedModel
from rlctl_train.config.reward import CustomReward, MathReward, RewardConfig, SumReward
from rlctl_train.config.rollout import VllmRollout

NEEDED = {"torch": "train", "ray": "train", "transformers": "train", "safetensors": "train", "pyarrow": "train"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
PARQUET_MAGIC = b"PAR1"
IMPORT_LIMIT_S = 120
BYTES_PER_PARAMETER = 12
"""fp32 weights and two fp32 moments."""
SPARE_BYTES = 256 * 2**20

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


def check(config: RunConfig, runs_root: Path) -> None:
    """Raise the first thing that would stop the run, before anything is written."""
    for problem in _problems(config, runs_root):
        raise UserError(*problem, exit_code=PREFLIGHT)


def _problems(config: RunConfig, runs_root: Path) -> Iterator[tuple[str, str]]:
    yield from _packages(config)
    yield from _data(config)
    yield from _model(config)
    yield from _reward_functions(config.reward)
    yield from _disk(config, runs_root)


def _packages(config: RunConfig) -> Iterator[tuple[str, str]]:
    needed = dict(NEEDED)
    if isinstance(config.rollout, VllmRollout):
        needed["vllm"] = "vllm"
    if any(isinstance(reward, MathReward) for reward in _leaf_rewards(config.reward)):
        needed["math_verify"] = "math"
    needed |= {name: "trackers" for name in config.telemetry.trackers if name != "tensorboard"}
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(needed[name] for name in missing))
        yield f"{', '.join(missing)} is not installed", f"pip install 'rlctl[{extras}]'"


def _data(config: RunConfig) -> Iterator[tuple[str, str]]:
    data = config.data
    if not isinstance(data, ParquetData):
        return
    for key, value in (("data.train", data.train), ("data.val", data.val)):
        if value is None:
            continue
        path = Path(value).expanduser()
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not path.exists():
            yield f"{key}={value}: there is no such file", "make it with `rlctl data prep`, or correct the path"
        elif not files:
            yield f"{key}={value}: the folder holds no parquet file", "make one with `rlctl data prep`"
        for file in files:
            if file.is_file() and not _is_parquet(file):
                yield f"{key}={file}: this is not a whole parquet file", "make it again with `rlctl data prep`"


def _is_parquet(file: Path) -> bool:
    size = len(PARQUET_MAGIC)
    with file.open("rb") as stream:
        head = stream.read(size)
        stream.seek(0, 2)
        stream.seek(max(stream.tell() - size, 0))
        return head == PARQUET_MAGIC == stream.read(size)


def _model(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    if not isinstance(model, PretrainedModel):
        return
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        if _looks_local(model.path):
            yield f"model.path={model.path}: there is no such folder", "correct the path, or give a hub id OWNER/NAME"
        return
    if not (folder / "config.json").is_file():
        yield f"model.path={model.path}: the folder has no config.json", "give a Hugging Face model folder"
    if not any(folder.glob("*.safetensors")):
        yield f"model.path={model.path}: the folder has no safetensors file", "give a folder with weights"
    place = Path(model.tokenizer).expanduser() if model.tokenizer else folder
    if place.is_dir() and not any((place / name).is_file() for name in TOKENIZER_FILES):
        key = "model.tokenizer" if model.tokenizer else "model.path"
        yield f"{key}={place}: the folder has no tokenizer", "set model.tokenizer to a folder or hub id with one"


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def _reward_functions(reward: RewardConfig | None) -> Iterator[tuple[str, str]]:
    for part in _leaf_rewards(reward):
        if not isinstance(part, CustomReward):
            continue
        try:
            done = subprocess.run(
                [sys.executable, "-c", LOAD_FUNCTION, part.path],
                capture_output=True, text=True, timeout=IMPORT_LIMIT_S, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield f"reward.path={part.path} does not import within {IMPORT_LIMIT_S} s", "do less at import"
            continue
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"the import ended with code {done.returncode}"]
            yield f"reward.path={part.path}: {lines[-1]}", "correct the file; the form is FILE.py:FUNCTION"


def _leaf_rewards(reward: RewardConfig | None) -> tuple[object, ...]:
    if reward is None:
        return ()
    return reward.parts if isinstance(reward, SumReward) else (reward,)


def _disk(config: RunConfig, runs_root: Path) -> Iterator[tuple[str, str]]:
    place = runs_root
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, _needed_bytes(config)
    if free < needed:
        yield (
            f"{place} has {free / 2**30:.1f} GiB free, and checkpoints need about {needed / 2**30:.1f} GiB",
            "free some space, lower checkpoint.keep_last, or set RLCTL_RUNS_DIR to another place",
        )


def _needed_bytes(config: RunConfig) -> int:
    """Estimate what checkpoints and export take: while one is written, the kept ones and the new one exist."""
    model = config.model
    weights = 0
    if isinstance(model, PretrainedModel):
        weights = sum(file.stat().st_size for file in Path(model.path).expanduser().glob("*.safetensors"))
    parameters = weights // 2
    policies = 2 if "critic" in config.algo.roles() else 1
    saves = config.checkpoint.keep_last + 1
    return SPARE_BYTES + parameters * BYTES_PER_PARAMETER * policies * saves + weights * config.checkpoint.export_hf
