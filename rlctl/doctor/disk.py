"""Disk space: checkpoints in the run folder, downloaded weights, and Ray's scratch folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlctl_hw.params import lora_params
from rlctl_hw.types import ModelShape

from rlctl.doctor.case import GIB, Case
from rlctl.doctor.finding import Finding, Problem, fail, verdict, warn
from rlctl.doctor.materials import hub_cache, is_cached, is_hub_id
from rlctl.workload import shape_of
from rlctl_train.config import RunConfig
from rlctl_train.config.model import ModelConfig, PretrainedModel

BYTES_PER_PARAMETER = 12
"""fp32 weights and two fp32 moments."""
BYTES_PER_WEIGHT = 2
SPARE_BYTES = 256 * 2**20
SCRATCH_BYTES = 2 * 2**30
"""Ray's logs and sockets, and what it spills of a small run."""


def check(case: Case) -> Finding:
    """Compare free space with what the run will write, or with the least any run needs."""
    place = existing(case.runs_root)
    return verdict("disk", _problems(case, place), f"{case.tools.free(place) / GIB:.1f} GiB free in {place}")


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Estimate what checkpoints and export take: while one is written, the kept ones and the new one exist."""
    lora = config.model.lora
    trained = shape.num_params if lora is None else lora_params(shape, lora.rank)
    policies = sum(role in ("actor", "critic", "reward_model") for role in config.algo.roles())
    saves = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    export = BYTES_PER_WEIGHT * shape.num_params * config.checkpoint.export_hf
    return SPARE_BYTES + trained * BYTES_PER_PARAMETER * policies * saves + export


def _problems(case: Case, place: Path) -> Iterator[Problem]:
    config = case.config
    # With a plan the shape is known without asking the hub again.
    shape = None if config is None or case.plan is None else shape_of(config)
    needed = SPARE_BYTES if config is None or shape is None else checkpoint_bytes(config, shape)
    if not case.tools.may_write(place):
        yield fail(f"{place} may not be written", "set RLCTL_RUNS_DIR to another place")
    free = case.tools.free(place)
    if free < needed:
        yield fail(
            f"{place} has {free / GIB:.1f} GiB free, and checkpoints need about {needed / GIB:.1f} GiB",
            "free some space, lower checkpoint.keep_last, or set RLCTL_RUNS_DIR to another place",
        )
    if config is not None and shape is not None:
        yield from _download(case, config.model, shape)
    scratch = existing(Path(case.host.env.get("RAY_TMPDIR") or tempfile.gettempdir()))
    if case.tools.free(scratch) < SCRATCH_BYTES:
        what = f"{scratch}, where Ray keeps its session, has {case.tools.free(scratch) / GIB:.1f} GiB free"
        yield warn(what, "free some space there, or set RAY_TMPDIR to another place")


def _download(case: Case, model: ModelConfig, shape: ModelShape) -> Iterator[Problem]:
    if not isinstance(model, PretrainedModel) or not is_hub_id(model.path) or is_cached(case.host.env, model.path):
        return
    needed, cache = BYTES_PER_WEIGHT * shape.num_params, existing(hub_cache(case.host.env))
    if case.tools.free(cache) < needed:
        yield fail(
            f"{cache} has {case.tools.free(cache) / GIB:.1f} GiB free, and the weights of {model.path} take "
            f"{needed / GIB:.1f} GiB",
            "free some space, or set HF_HOME to another place",
        )
