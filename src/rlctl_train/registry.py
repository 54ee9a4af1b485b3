"""Tables of names: each entry is `module:object`, imported on first use. Also the one door for users' own code."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALGOS = {
    "dapo": "rlctl_train.algos.dapo:Dapo",
    "grpo": "rlctl_train.algos.grpo:Grpo",
    "ppo": "rlctl_train.algos.ppo:Ppo",
}
LOSSES = {
    "clip": "rlctl_train.algos.clip:Clip",
}
FLOWS = {
    "dapo": "rlctl_train.flows.dapo:step",
    "grpo": "rlctl_train.flows.on_policy:step",
    "ppo": "rlctl_train.flows.on_policy:step",
    "sft": "rlctl_train.flows.supervised:step",
}
ENGINES = {"fsdp2": "rlctl_train.engines.fsdp2:Fsdp2Engine"}
ROLLOUTS = {
    "hf": "rlctl_train.rollout.hf:HfRolloutEngine",
    "vllm": "rlctl_train.rollout.vllm:VllmRolloutEngine",
}
REWARDS = {
    "arithmetic": "rlctl_train.rewards.arithmetic:make",
    "gsm8k": "rlctl_train.rewards.gsm8k:make",
    "math": "rlctl_train.rewards.math:make",
    "custom": "rlctl_train.rewards.custom:make",
    "sum": "rlctl_train.rewards.combine:make",
}


class UserCodeError(Exception):
    """A user's `FILE.py:NAME` could not be loaded; the message says why and what to do."""


def load(table: Mapping[str, str], name: str) -> Any:
    """Return the object registered under `name`; an unknown name lists the known ones."""
    if name not in table:
        raise KeyError(f"{name!r} is not one of {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_user_object(path: str) -> Any:
    """Import `FILE.py:NAME` and return the object; every failure is a `UserCodeError` that says the way out."""
    file_name, separator, attribute = path.rpartition(":")
    if not separator or not file_name.endswith(".py") or not attribute.isidentifier():
        raise UserCodeError(f"{path!r} is not of the form FILE.py:NAME")
    file = Path(file_name).expanduser().resolve()
    if not file.is_file():
        raise UserCodeError(f"no such file: {file_name}")
    name = f"rlctl_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # a user's file may raise anything, SystemExit included
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserCodeError(f"{file_name} does not import: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        known = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(attribute, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserCodeError(f"{file_name} has no {attribute!r}{hint}")
    return getattr(module, attribute)
