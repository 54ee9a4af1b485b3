"""Checkpoints of our own runs, and plain folders of torch.distributed.checkpoint, in which ours lie.

A run, its folder of checkpoints, one step or one role of a step may be named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlctl_train.checkpoint.dcp import read_dcp
from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.kinds import huggingface
from rlctl_train.checkpoint.kinds.folder import dtype_words, missing, read_table, some
from rlctl_train.checkpoint.kinds.verl_lora import renamed
from rlctl_train.checkpoint.store import MANIFEST, CheckpointStore, is_complete
from rlctl_train.checkpoint.stored import Adapter, Checkpoint, NamedTensor
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import LoraConfig

ROLES = ("actor", "critic", "reference")
"""Roles whose weights may be saved; the first that is there is what a step is read as."""
WEIGHTS, MOMENTS, RANDOM = "model.", "optim.", "rng."
"""How the names of a role's tensors begin."""
MEGATRON = ("common.pt", "metadata.json")
"""Files that Megatron-core puts beside `.metadata`."""
OPTIMIZERS = ("optimizer.", "optim.")
"""How names of optimizer state begin in folders that others have written."""
DOWN, UP = ".lora_A", ".lora_B"


def recognise(path: Path) -> str | None:
    """Say why a folder is a checkpoint of ours or of torch's; None where it is neither."""
    if (path / ".metadata").is_file():
        ours = (path.parent / MANIFEST).is_file()
        if not ours and any((path / name).is_file() for name in MEGATRON):
            return None
        return "it is one role of a step of a run" if ours else "it has .metadata of torch.distributed.checkpoint"
    if (path / MANIFEST).is_file() and any(path.glob("*/.metadata")):
        return f"it has {MANIFEST} and sharded roles"
    for folder, what in ((path, "steps of a run"), (RunFiles(path).checkpoints, "a run with checkpoints")):
        if any(folder.glob(f"step_*/{MANIFEST}")):
            return f"it is {what}" if folder != path else f"it holds {what}"
    return None


def read(path: Path) -> Checkpoint:
    """Read the policy's weights and whatever was saved beside them."""
    if (path / ".metadata").is_file() and not (path.parent / MANIFEST).is_file():
        return _read_foreign(path)
    place = _find(path)
    run = _Run.of(place.step)
    parts = _parts(place.role)
    tensors = parts.weights
    others = {"optimizer": parts.optimizer, "random_state": parts.random}
    for role in place.other_roles:
        beside = _parts(role)
        others |= {role.name: beside.weights, f"{role.name}.optimizer": beside.optimizer}
    adapter, notes = None, [*run.notes, *place.notes]
    if run.lora is not None:
        adapter, tensors, more = _adapted(tensors, run)
        others["base"] = parts.rest
        notes += more
    return Checkpoint(
        kind="rlctl",
        path=path,
        tensors=tensors,
        hf_folder=run.model,
        adapter=adapter,
        others={name: part for name, part in others.items() if part},
        facts=_facts(place, run, tensors if adapter is None else adapter.tensors),
        notes=tuple(notes),
        files=tuple(sorted(file for file in place.step.rglob("*") if file.is_file())),
    )


@dataclass(frozen=True)
class _Place:
    """Which step is read, and as which role."""

    step: Path
    role: Path
    other_roles: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Parts:
    """What a role's folder holds; weights and moments under the names of the Hugging Face model."""

    weights: dict[str, NamedTensor]
    optimizer: dict[str, NamedTensor]
    random: dict[str, NamedTensor]
    rest: dict[str, NamedTensor]


@dataclass(frozen=True)
class _Run:
    """What the run says of the model that a checkpoint belongs to."""

    config: Mapping[str, Any]
    model: Path | None
    lora: LoraConfig | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, step: Path) -> _Run:
        """Read the config of the run that a step lies in, as its driver does; the warm start has that of its run."""
        root = step.parent.parent
        warming_up = root.name == "warm_start" and not RunFiles(root).config.is_file()
        files = RunFiles(root.parent if warming_up else root)
        if not files.config.is_file():
            return cls({}, None, None, ("there is no run around it: what model it belongs to is not known",))
        config = read_table(files.config)
        asked = config.get("model", {})
        lora = None if warming_up else _lora(asked, files.config)
        notes: list[str] = []
        warm = RunFiles(files.root / "warm_start").hf
        if warm.is_dir() and not warming_up:
            return cls(config, warm, lora, ())
        model = files.model if asked.get("type") == "random" else _pretrained(asked)
        if model is None or not model.is_dir():
            model = None
            notes.append(f"config and tokenizer of {asked.get('path', 'the model')} are not on this machine")
        if asked.get("tokenizer") is not None:
            notes.append(f"the tokenizer is not the model's own, but that of {asked['tokenizer']}")
        return cls(config, model, lora, tuple(notes))


def _lora(asked: Mapping[str, Any], config: Path) -> LoraConfig | None:
    try:
        return None if asked.get("lora") is None else LoraConfig.model_validate(asked["lora"])
    except ValidationError as error:
        raise damaged(str(config), f"model.lora makes no sense ({error.errors()[0]['msg']})") from error


def _pretrained(asked: Mapping[str, Any]) -> Path | None:
    """Return the folder of a model: the one that is named, or what the hub's cache has of it."""
    name = str(asked.get("path", ""))
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=asked.get("revision"))
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def _find(path: Path) -> _Place:
    notes: tuple[str, ...] = ()
    role = None
    if (path / ".metadata").is_file():
        step, role = path.parent, path
    elif (path / MANIFEST).is_file():
        step = path
    else:
        folder = path if any(path.glob(f"step_*/{MANIFEST}")) else RunFiles(path).checkpoints
        latest = CheckpointStore(folder, 1).latest()
        if latest is None:
            raise missing(path, "there is no complete checkpoint")
        step, notes = latest, (f"{latest.name} is the newest complete checkpoint",)
    if not is_complete(step):
        raise damaged(str(step), f"its files are not those that {MANIFEST} lists")
    roles = [step / name for name in ROLES if (step / name / ".metadata").is_file()]
    if not roles:
        raise missing(step, f"there is none of the roles {', '.join(ROLES)}")
    if role is not None:
        return _Place(step, role, (), notes)
    return _Place(step, roles[0], tuple(roles[1:]), notes)


def _parts(role: Path) -> _Parts:
    tensors, unknown = read_dcp(role)
    if unknown:
        raise damaged(str(role), f"it holds things that are no tensors: {some(unknown)}")
    parts = _Parts({}, {}, {}, {})
    for name, tensor in tensors.items():
        if name.startswith(WEIGHTS):
            into, new_name = parts.weights, name.removeprefix(WEIGHTS)
        elif name.startswith(MOMENTS):
            into, new_name = parts.optimizer, f"state.{name.removeprefix(MOMENTS)}"
        elif name.startswith(RANDOM):
            into, new_name = parts.random, name.removeprefix(RANDOM)
        else:
            into, new_name = parts.optimizer if name == "schedule" else parts.rest, name
        into[new_name] = renamed(tensor, new_name)
    return parts


def _adapted(trained: Mapping[str, NamedTensor], run: _Run) -> tuple[Adapter, dict[str, NamedTensor], list[str]]:
    """Return the adapters under PEFT's names, and the weights they lie beside, which are those the run began with."""
    from rlctl_train.engines.adapters import peft_name, peft_settings

    assert run.lora is not None
    own = {name: tensor for name, tensor in trained.items() if name.endswith((DOWN, UP))}
    named = {peft_name(name): renamed(tensor, peft_name(name)) for name, tensor in own.items()}
    adapter = Adapter(peft_settings(run.lora, str(run.model or ""), own), named)
    weights: dict[str, NamedTensor] = {}
    if run.model is None:
        notes = ["only adapters are saved, and the weights they belong to are not on this machine"]
    else:
        weights |= huggingface.read(run.model).tensors
        notes = [f"only adapters are saved; the weights are those of {run.model}, which the run began with"]
    beside = {name: tensor for name, tensor in trained.items() if name not in own}
    return adapter, weights | beside, notes


def _facts(place: _Place, run: _Run, tensors: Mapping[str, NamedTensor]) -> dict[str, str | int]:
    manifest = json.loads((place.step / MANIFEST).read_text())
    asked, algo = run.config.get("model", {}), run.config.get("algo", {})
    files = {str(file.name) for file in place.role.glob("*.distcp")}
    facts: dict[str, str | int] = {
        "step": int(manifest["step"]),
        "role": place.role.name,
        "shard_files": len(files),
        "dtype": dtype_words(tensors.values()),
    }
    if asked:
        facts["model"] = str(asked.get("path", asked.get("architecture", "unknown")))
    if algo:
        facts["algorithm"] = str(algo.get("type", "unknown"))
    return facts


def _read_foreign(folder: Path) -> Checkpoint:
    """Read a folder that torch.distributed.checkpoint wrote for somebody else, names as they are."""
    tensors, unknown = read_dcp(folder)
    optimizer = {name: tensor for name, tensor in tensors.items() if name.startswith(OPTIMIZERS)}
    weights = {name: tensor for name, tensor in tensors.items() if name not in optimizer}
    notes = [f"things that are no tensors are left out: {some(unknown)}"] if unknown else []
    doubled = any(name.startswith(WEIGHTS * 2) for name in weights)
    if doubled and all(name.startswith(WEIGHTS) for name in weights):
        notes.append("every name begins with a further `model.`, the key of a state dict, which is left out")
        short = {name.removeprefix(WEIGHTS): tensor for name, tensor in weights.items()}
        weights = {name: renamed(tensor, name) for name, tensor in short.items()}
    return Checkpoint(
        kind="rlctl",
        path=folder,
        tensors=weights,
        hf_folder=folder if (folder / "config.json").is_file() else None,
        others={"optimizer": optimizer} if optimizer else {},
        facts={"format": "torch.distributed.checkpoint", "dtype": dtype_words(weights.values())},
        notes=tuple(notes),
        files=(folder / ".metadata", *sorted(folder.glob("*.distcp"))),
    )
