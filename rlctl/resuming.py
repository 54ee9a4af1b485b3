"""Continuing a run elsewhere: its plan anew, what that changes, and what may not change.

Where and how fast a run trains may change between its steps. What it learns may not: algorithm, data, model,
optimizer, seed and global batch stay those it began with. Nothing here writes or prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlctl_hw.types import Hardware, Plan

from rlctl import planning
from rlctl.compare import Difference, differences
from rlctl.overrides import Assignment
from rlctl.problems import Finding, InvalidConfig, show
from rlctl.resolve import Resolved, flat, reopen
from rlctl.rundir import Run
from rlctl_train.config import RunConfig
from rlctl_train.config.algo import SftConfig
from rlctl_train.config.errors import UserError

SOURCE = "command line of `resume`"
SECTIONS = ("checkpoint", "health", "launch", "ray", "sync", "telemetry", "validation")
"""Sections that may change as a whole."""
KEYS = (
    "engine.compute_dtype",
    "engine.gradient_checkpointing",
    "engine.logits_chunk_tokens",
    "engine.max_tokens_per_micro_batch",
    "engine.offload_optimizer",
    "engine.offload_params",
    "engine.packing",
    "engine.reshard_after_forward",
    "grader.num_workers",
    "placement",
    "rollout.dtype",
    "rollout.enforce_eager",
    "rollout.gpu_memory_share",
    "rollout.kv_cache_gib",
    "rollout.max_concurrent",
    "rollout.num_devices",
    "rollout.tensor_parallel",
    "trainer.num_devices",
    "trainer.threads_per_worker",
)
"""Single settings that may change."""
PRECISIONS = {"compute_dtype": "engine.compute_dtype", "rollout_dtype": "rollout.dtype"}
"""Each precision of a plan, and the setting that pins it."""
PLACE = (
    "device", "num_nodes", "trainer_devices", "rollout_devices", "threads_per_worker", "placement", "mesh",
    "rollout_tensor_parallel",
)  # fmt: skip
"""What of a plan shows that the machine is another one, beside the memory of its devices."""
SAME_MEMORY = 0.02
"""Share by which the memory of the same device may differ from one driver or kernel to the next."""
PREDICTIONS = ("memory", "bands", "host_memory", "times", "choices", "notes")
"""What of a plan follows from its decisions."""


@dataclass(frozen=True)
class Resumption:
    """How a run goes on: configuration and plan from now on, and what is other than before, a line each."""

    config: RunConfig
    plan: Plan
    changes: tuple[str, ...]
    origin: dict[str, Any]
    """Content of `origin.json`."""


def replan(run: Run, hardware: Hardware | None, overrides: Iterable[Assignment] = ()) -> Resumption:
    """Return how a run goes on, on this hardware and with these settings on top of its own.

    Without hardware given, it is where `launch` leads: this machine, or the machines that are named there. The plan
    stays as it is where both the machine and the settings that it follows from are the same.
    """
    origin, was = run.origin(), run.plan()
    sources = {key: entry["source"] for key, entry in origin.get("values", {}).items()}
    before = reopen(run.config(), sources)
    after = reopen(run.config(), sources, [replace(item, source=SOURCE) for item in overrides])
    changed = differences(*(flat(found.config.model_dump(mode="json")) for found in (before, after)))
    _check_settings(run, after, changed)
    planning.check_can_train(after.config)
    plan = planning.plan_here(after.config, hardware or planning.machine_of(after.config.launch))
    _check_precision(was, plan, {key for key, _, _ in changed})
    if _same_place(was, plan) and planning.workload_of(before.config) == planning.workload_of(after.config):
        plan = was
    changes = tuple(_lines([*changed, *_decisions(was, plan)]))
    resumes = [*origin.get("resumes", ()), {"step": run.status().step, "changes": changes}]
    return Resumption(after.config, plan, changes, origin | {"values": after.to_json()["values"], "resumes": resumes})


def may_change(key: str) -> bool:
    """Say whether a setting may differ after a resume: one of where and how fast, not of what is learnt."""
    return key in KEYS or key.partition(".")[0] in SECTIONS


def global_batch(config: RunConfig) -> str:
    """Say what each step learns from, which no resume changes."""
    trainer = config.trainer
    group = 1 if isinstance(config.algo, SftConfig) else config.algo.group_size
    return (
        f"{trainer.prompts_per_step} prompt(s) x {group} response(s) a step, in {trainer.mini_batches_per_step} "
        "mini-batch(es)"
    )


def _check_settings(run: Run, after: Resolved, changed: Sequence[Difference]) -> None:
    """Refuse every change of what is learnt."""
    folder = run.files.hf
    remedy = (
        f"leave it out; or start a new run with it from the model of this one, which lies in {folder} once it is done: "
        f"model.type=pretrained model.path={folder}"
    )
    findings = [
        Finding(key, now, after.origins[key].source if key in after.origins else SOURCE, _unlike(was), remedy)
        for key, was, now in changed
        if not may_change(key)
    ]
    if findings:
        raise InvalidConfig(findings)


def _unlike(was: Any) -> str:
    return f"changes what the run learns (it began with {show(was)}), and a resume cannot do that"


def _check_precision(was: Plan, new: Plan, changed: set[str]) -> None:
    """Refuse to compute in another precision than so far, unless a person has just said so."""
    for field, key in PRECISIONS.items():
        old, now = getattr(was, field), getattr(new, field)
        if old != now and not changed & {key, PRECISIONS["compute_dtype"]}:
            raise UserError(
                f"on this machine the plan has {key}={now}, but the run has used {old} so far",
                f"keep it with {key}={old}, or change it knowingly with {key}={now}",
            )


def _same_place(was: Plan, new: Plan) -> bool:
    same = all(getattr(was, field) == getattr(new, field) for field in PLACE)
    return same and math.isclose(was.device_memory_gib, new.device_memory_gib, rel_tol=SAME_MEMORY)


def _decisions(was: Plan, new: Plan) -> list[Difference]:
    """Return what two plans decide differently, by the names of their fields in plain words."""
    plain = [{k: v for k, v in asdict(plan).items() if k not in PREDICTIONS} for plan in (was, new)]
    return [(name.replace("_", " "), old, now) for name, old, now in differences(*(flat(tree) for tree in plain))]


def _lines(changed: Iterable[Difference]) -> Iterator[str]:
    for name, was, now in changed:
        yield f"{name}: {_short(was)} -> {_short(now)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)
