"""How a run goes on elsewhere: what is planned anew and told, what stays, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.probe import parse_hardware

from rlctl import planning, resolve, resuming, rundir, schema
from rlctl.overrides import parse_arguments
from rlctl.problems import InvalidConfig
from rlctl_train.config.errors import UserError


def stored(root: Path, machine: str, *words: str) -> rundir.Run:
    """Write the folder of a run that was launched on a machine with these settings."""
    found = resolve.build("quickstart", overrides=parse_arguments(words).overrides)
    plan = planning.plan_here(found.config, parse_hardware(machine)).to_json()
    origin = found.to_json() | {"asked_for": "quickstart"}
    return rundir.create(root, "first", config=found.config.model_dump(mode="json"), plan=plan, origin=origin)


def replanned(run: rundir.Run, machine: str, *words: str) -> resuming.Resumption:
    return resuming.replan(run, parse_hardware(machine), parse_arguments(words).overrides)


def batch_of(config: Any) -> tuple[int, ...]:
    trainer = config.trainer
    return trainer.prompts_per_step, trainer.mini_batches_per_step, trainer.epochs_per_step, config.algo.group_size


def test_on_the_same_machine_nothing_changes(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:2")
    found = replanned(run, "h100-80gb:2")
    assert (found.changes, found.plan) == ((), run.plan())
    assert found.config.model_dump(mode="json") == run.config()


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_other_numbers_of_devices_are_planned_for_and_told_and_the_global_batch_stays(
    tmp_path: Path, before: int, after: int
) -> None:
    run = stored(tmp_path, f"h100-80gb:{before}")
    found = replanned(run, f"h100-80gb:{after}")
    assert f"trainer devices: {before} -> {after}" in found.changes
    assert f"rollout devices: {before} -> {after}" in found.changes
    assert found.plan.trainer_devices == found.plan.mesh.world_size == after
    again = resolve.reopen(run.config(), {}).config
    assert batch_of(found.config) == batch_of(again)
    assert resuming.global_batch(found.config).startswith(f"{batch_of(again)[0]} prompt(s) x {batch_of(again)[3]} ")


def test_smaller_devices_are_noticed(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:2")
    found = replanned(run, "a100-40gb:2")
    assert found.plan.device_memory_gib < run.plan().device_memory_gib
    assert [line for line in found.changes if line.startswith("device memory gib: ")]


def test_fewer_cores_are_noticed_where_only_threads_tell(tmp_path: Path) -> None:
    found = replanned(stored(tmp_path, "cpu:4", "trainer.threads_per_worker=null"), "cpu:1")
    assert "threads per worker: 4 -> 1" in found.changes


def test_a_pinned_number_of_devices_that_is_not_there_is_refused_by_its_key(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:4", "trainer.num_devices=4")
    with pytest.raises(UserError, match=r"trainer\.num_devices=4, but there are 2 cuda devices"):
        replanned(run, "h100-80gb:2")
    assert replanned(run, "h100-80gb:2", "trainer.num_devices=null").plan.trainer_devices == 2


def test_settings_of_where_and_how_fast_change_and_are_told_with_their_origin(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:4")
    found = replanned(run, "h100-80gb:4", "placement=split", "trainer.num_devices=2", "rollout.num_devices=1")
    assert (found.plan.trainer_devices, found.plan.rollout_devices) == (2, 1)
    assert "trainer.num_devices: null -> 2" in found.changes and "trainer devices: 4 -> 2" in found.changes
    assert found.origin["values"]["trainer.num_devices"] == {"value": 2, "source": resuming.SOURCE}
    assert found.origin["asked_for"] == "quickstart"
    assert found.origin["resumes"] == [{"step": 0, "changes": found.changes}]


def test_without_hardware_it_is_planned_for_where_the_run_is_launched(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:2")
    words = parse_arguments(["launch.type=slurm", "launch.machine=h100-80gb:4", "launch.nodes=2"]).overrides
    found = resuming.replan(run, None, words)
    assert (found.plan.num_nodes, found.plan.trainer_devices) == (2, 8)
    assert {"launch.type: local -> slurm", "num nodes: 1 -> 2"} <= set(found.changes)


def test_a_setting_that_no_plan_follows_from_leaves_the_plan_alone(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:2")
    plan = run.plan().to_json() | {"max_tokens_per_micro_batch": 777}
    rundir.amend(run, config=run.config(), plan=plan, origin=run.origin())
    found = replanned(run, "h100-80gb:2", "checkpoint.every_steps=3")
    assert found.plan.max_tokens_per_micro_batch == 777
    assert [line.split(":")[0] for line in found.changes] == ["checkpoint.every_steps"]
    budget = replanned(run, "h100-80gb:2", "engine.max_tokens_per_micro_batch=2048")
    assert "max tokens per micro batch: 777 -> 2048" in budget.changes


@pytest.mark.parametrize(
    "word",
    [
        "seed=7", "algo.type=rloo", "algo.group_size=4", "trainer.prompts_per_step=16", "trainer.num_steps=7",
        "trainer.mini_batches_per_step=1", "trainer.optim.lr=0.5", "data.num_train=100", "model.hidden_size=32",
        "rollout.temperature=0.5", "rollout.max_response_tokens=3", "engine.type=megatron", "warm_start=null",
    ],
)  # fmt: skip
def test_what_is_learnt_does_not_change(tmp_path: Path, word: str) -> None:
    run = stored(tmp_path, "cpu:2", "trainer.mini_batches_per_step=2")
    with pytest.raises(InvalidConfig) as caught:
        replanned(run, "cpu:2", word)
    found = next(f for f in caught.value.findings if f.key.startswith(word.partition("=")[0]))
    assert "changes what the run learns" in found.what
    assert f"model.path={run.files.hf}" in found.remedy


def test_every_refused_setting_is_named_and_the_value_it_has_is_no_change(tmp_path: Path) -> None:
    run = stored(tmp_path, "cpu:2", "seed=5")
    with pytest.raises(InvalidConfig) as caught:
        replanned(run, "cpu:2", "seed=6", "algo.group_size=4", "trainer.num_devices=2")
    assert [f.key for f in caught.value.findings] == ["seed", "algo.group_size"]
    assert replanned(run, "cpu:2", "seed=5").changes == ()
    with pytest.raises(InvalidConfig, match="is not a setting"):
        replanned(run, "cpu:2", "trainer.num_device=2")


def test_another_precision_must_be_said(tmp_path: Path) -> None:
    run = stored(tmp_path, "cpu:2")
    with pytest.raises(UserError, match=r"engine\.compute_dtype=bfloat16, but the run has used float32") as caught:
        replanned(run, "h100-80gb:1")
    assert "keep it with engine.compute_dtype=float32" in caught.value.remedy
    kept = replanned(run, "h100-80gb:1", "engine.compute_dtype=float32")
    assert (kept.plan.compute_dtype, kept.plan.rollout_dtype) == ("float32", "float32")
    changed = replanned(run, "h100-80gb:1", "engine.compute_dtype=bfloat16")
    assert {"compute dtype: float32 -> bfloat16", "rollout dtype: float32 -> bfloat16"} <= set(changed.changes)


def test_what_may_change_exists() -> None:
    known = schema.all_keys()
    assert [key for key in resuming.KEYS if key not in known] == []
    assert [key for key in known if resuming.may_change(key) and key.startswith(("algo", "data", "model"))] == []


def test_what_drove_a_run_before_is_kept(tmp_path: Path) -> None:
    run = stored(tmp_path, "h100-80gb:2")
    first = run.plan()
    for number, machine in ((1, "h100-80gb:4"), (2, "h100-80gb:8")):
        found = replanned(run, machine)
        config = found.config.model_dump(mode="json")
        kept = rundir.amend(run, config=config, plan=found.plan.to_json(), origin=found.origin)
        assert kept == run.files.history / str(number)
        assert run.plan().trainer_devices == int(machine[-1])
    assert json.loads((run.files.history / "1" / "plan.json").read_text()) == json.loads(json.dumps(first.to_json()))
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "origin.json", "plan.json"]
    assert len(run.origin()["resumes"]) == 2
    assert replanned(run, "h100-80gb:8").changes == ()
