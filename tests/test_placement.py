"""Placement: every worker gets a share of a device; no device is given out more than once over."""

from dataclasses import replace
from typing import Any

import pytest
from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import LAUNCH, UserError
from rlctl_train.placement import in_order, lay_out

PLAN = Plan(
    device="cpu",
    num_nodes=1,
    trainer_devices=2,
    rollout_devices=2,
    threads_per_worker=1,
    compute_dtype="float32",
    rollout_dtype="float32",
    max_tokens_per_micro_batch=1024,
    rollout_max_concurrent=64,
    rollout_gpu_memory_share=0.5,
    object_store_gib=0.2,
)


def config(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"type": "random"},
        "data": {"type": "arithmetic"},
        "reward": {"type": "arithmetic"},
        "algo": {"type": "ppo", "kl_loss_coef": 0.1},
    }
    return RunConfig.model_validate({**base, **sections})


@pytest.mark.parametrize("placement", ["colocated", "split"])
def test_no_device_is_shared_beyond_one(placement: str) -> None:
    layout = lay_out(PLAN, config(placement=placement))
    taken = [0.0] * layout.num_bundles
    for slots in layout.slots.values():
        for slot in slots:
            taken[slot.bundle] += slot.share
    assert all(0 < share <= 1 for share in taken)


def test_split_gives_rollout_devices_of_its_own() -> None:
    layout = lay_out(PLAN, config(placement="split"))
    trainer = {slot.bundle for role in ("actor", "critic", "reference") for slot in layout.slots[role]}
    assert trainer == {0, 1} and {slot.bundle for slot in layout.slots["rollout"]} == {2, 3}


def test_colocated_roles_share_the_same_devices() -> None:
    layout = lay_out(PLAN, config(placement="colocated"))
    assert layout.num_bundles == 2 and all({s.bundle for s in slots} == {0, 1} for slots in layout.slots.values())


def test_supervised_training_without_reward_has_no_rollout() -> None:
    layout = lay_out(PLAN, config(algo={"type": "sft"}, reward=None))
    assert set(layout.slots) == {"actor"}


def test_accelerators_are_asked_for_by_their_ray_name() -> None:
    assert lay_out(replace(PLAN, device="ascend"), config()).needed["NPU"] == 2
    assert lay_out(replace(PLAN, device="cuda"), config()).needed["GPU"] == 2


def split_over_two(**sizes: int) -> Any:
    return lay_out(replace(PLAN, rollout_tensor_parallel=2, **sizes), config(rollout={"type": "vllm"}))


def test_the_ranks_of_one_engine_get_neighbouring_devices_of_one_node() -> None:
    layout = split_over_two(trainer_devices=4, rollout_devices=4)
    nodes, devices = {0: "b", 1: "a", 2: "b", 3: "a"}, {0: 1, 1: 3, 2: 0, 3: 2}
    placed = in_order(layout, nodes, devices)
    assert [slot.bundle for slot in placed.slots["rollout"]] == [3, 1, 2, 0]
    assert placed.slots["actor"] == placed.slots["rollout"]


def test_an_engine_that_would_span_nodes_is_refused() -> None:
    layout = split_over_two(trainer_devices=4, rollout_devices=4)
    with pytest.raises(UserError, match="a rollout engine of 2 devices would span 2 nodes") as caught:
        in_order(layout, dict(enumerate("abbb")), dict.fromkeys(range(4), 0))
    assert caught.value.exit_code == LAUNCH and "rollout.tensor_parallel" in caught.value.remedy
