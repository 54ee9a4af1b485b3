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

from rlctl_train.importing import uncollected

ALGOS = {
    "dapo": "rlctl_train.algos.dapo:Dapo",
    "distill": "rlctl_train.algos.distill:Distill",
    "gdpo": "rlctl_train.algos.gdpo:Gdpo",
    "gpg": "rlctl_train.algos.gpg:Gpg",
    "grpo": "rlctl_train.algos.grpo:Grpo",
    "opo": "rlctl_train.algos.opo:Opo",
    "otb": "rlctl_train.algos.otb:Otb",
    "passk_grpo": "rlctl_train.algos.passk_grpo:PassKGrpo",
    "ppo": "rlctl_train.algos.ppo:Ppo",
    "prime": "rlctl_train.algos.prime:Prime",
    "reinforce_pp": "rlctl_train.algos.reinforce_pp:ReinforcePp",
    "reinforce_pp_baseline": "rlctl_train.algos.reinforce_pp:ReinforcePpBaseline",
    "remax": "rlctl_train.algos.remax:Remax",
    "rloo": "rlctl_train.algos.rloo:Rloo",
    "spin": "rlctl_train.algos.spin:Spin",
    "sppo": "rlctl_train.algos.sppo:Sppo",
    "vapo": "rlctl_train.algos.vapo:Vapo",
}
LOSSES = {
    "cispo": "rlctl_train.algos.cispo:Cispo",
    "clip": "rlctl_train.algos.clip:Clip",
    "clip_cov": "rlctl_train.algos.clip_cov:ClipCov",
    "dpo": "rlctl_train.algos.dpo:Dpo",
    "dppo": "rlctl_train.algos.dppo:Dppo",
    "dro": "rlctl_train.algos.dro:Dro",
    "gmpo": "rlctl_train.algos.gmpo:Gmpo",
    "gpg": "rlctl_train.algos.gpg_loss:PolicyGradient",
    "gspo": "rlctl_train.algos.gspo:Gspo",
    "ipo": "rlctl_train.algos.ipo:Ipo",
    "kl_cov": "rlctl_train.algos.kl_cov:KlCov",
    "sapo": "rlctl_train.algos.sapo:Sapo",
    "sppo": "rlctl_train.algos.sppo_loss:SquaredLogRatio",
}
FLOWS = {
    "dapo": "rlctl_train.flows.dapo:step",
    "distill": "rlctl_train.flows.distill:step",
    "gdpo": "rlctl_train.flows.on_policy:step",
    "gpg": "rlctl_train.flows.on_policy:step",
    "grpo": "rlctl_train.flows.on_policy:step",
    "opo": "rlctl_train.flows.on_policy:step",
    "otb": "rlctl_train.flows.on_policy:step",
    "passk_grpo": "rlctl_train.flows.on_policy:step",
    "ppo": "rlctl_train.flows.on_policy:step",
    "prime": "rlctl_train.flows.prime:step",
    "reinforce_pp": "rlctl_train.flows.on_policy:step",
    "reinforce_pp_baseline": "rlctl_train.flows.on_policy:step",
    "remax": "rlctl_train.flows.remax:step",
    "rloo": "rlctl_train.flows.on_policy:step",
    "sft": "rlctl_train.flows.supervised:step",
    "spin": "rlctl_train.flows.spin:step",
    "sppo": "rlctl_train.flows.on_policy:step",
    "vapo": "rlctl_train.flows.on_policy:step",
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
    with uncollected():
        imported = importlib.import_module(module)
    return getattr(imported, attribute)


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
