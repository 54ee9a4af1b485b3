"""Adapters on two ranks do what they do on one: gradients, streamed weights, checkpoints, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from rlctl_train.config.model import LoraConfig
from rlctl_train.engines.fsdp2 import Fsdp2Engine
from tests.engine_support import (
    gradients,
    make_batch,
    make_engine,
    make_model,
    policy_objective,
    train,
    value_objective,
    weights,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-6}
SHARES = ([5, 0, 7], [1, 2, 3, 4, 6, 8, 9])
LORA = LoraConfig(rank=3, alpha=6)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small passes": {"max_tokens_per_micro_batch": 20},
    "recomputed": {"recompute": "full", "reshard_after_forward": False},
}


def engine_of(folder: Path, **changes: Any) -> Fsdp2Engine:
    return make_engine(str(folder / "model"), lora=LORA, **changes)


def run_rank(rank: int, folder: Path) -> None:
    """Do everything a second rank is needed for, once, and leave the results in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own, results = make_batch().rows(SHARES[rank]), {}
    for name, changes in CASES.items():
        engine = engine_of(folder, **changes)
        train(engine, own, 1)
        logp, _ = engine.logprobs(own, 1.0)
        loss = engine.forward_backward(own, policy_objective)["loss"]
        results[name] = (logp, loss, gradients(engine), weights(engine))
        with engine.adapters_off():
            results[name] += (engine.logprobs(own, 1.0)[0],)
    half = engine_of(folder, compute_dtype="bfloat16")
    train(half, own, 2)
    results["bfloat16"] = weights(half)
    half = engine_of(folder, compute_dtype="bfloat16")
    half.forward_backward(own, policy_objective)
    results["bfloat16 gradients"] = gradients(half)
    critic = engine_of(folder, role="critic")
    critic.forward_backward(own, value_objective)
    results["critic"] = gradients(critic)

    two = engine_of(folder)
    train(two, own, 2)
    two.save(folder / "from_two")
    results["continued"] = (train(two, own, 2), weights(two))
    again = engine_of(folder)
    again.load(folder / "from_two")
    results["resumed"] = (train(again, own, 2), weights(again))
    again.export(folder / "hf")
    torch.save(results, folder / f"results_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora_ranks")
    make_model(folder / "model")
    mp.spawn(run_rank, (folder,), nprocs=2)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(results: list[dict[str, Any]], folder: Path, case: str) -> None:
    alone = engine_of(folder)
    train(alone, make_batch(), 1)
    loss = alone.forward_backward(make_batch(), policy_objective)["loss"]
    for result, rows in zip(results, SHARES, strict=True):
        logp, own_loss, grads, streamed, without = result[case]
        # Its terms are of order one and cancel: what rounding leaves is a few times the float32 step at one.
        assert own_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(logp, alone.logprobs(make_batch(), 1.0)[0][rows], **CLOSE)
        torch.testing.assert_close(grads, gradients(alone), **CLOSE)
        torch.testing.assert_close(streamed, weights(alone), **CLOSE)
        base = make_engine(str(folder / "model"))
        torch.testing.assert_close(without, base.logprobs(make_batch(), 1.0)[0][rows], **CLOSE)


def test_half_precision_weights_stream_alike_from_both_ranks(results: list[dict[str, Any]], folder: Path) -> None:
    first, second = (result["bfloat16"] for result in results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    base = {name: weight.bfloat16().float() for name, weight in make_engine(str(folder / "model")).weights()}
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], first[name].float())}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_one_rank_needs_no_sharding_for_half_precision(results: list[dict[str, Any]], folder: Path) -> None:
    alone = engine_of(folder, compute_dtype="bfloat16")
    alone.forward_backward(make_batch(), policy_objective)
    sharded, plain = results[0]["bfloat16 gradients"], gradients(alone)
    assert not any(isinstance(module, FSDPModule) for module in alone._model.modules())
    assert {grad.dtype for grad in plain.values()} == {torch.float32}
    distance = sum(float((plain[name] - sharded[name]).square().sum()) for name in plain)
    assert distance < 0.03**2 * sum(float(grad.square().sum()) for grad in plain.values())


def test_a_critic_has_the_same_gradients_on_two_ranks(results: list[dict[str, Any]], folder: Path) -> None:
    alone = engine_of(folder, role="critic")
    alone.forward_backward(make_batch(), value_objective)
    torch.testing.assert_close(results[1]["critic"], gradients(alone), **CLOSE)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["resumed"][0] == result["continued"][0]
        torch.testing.assert_close(result["resumed"][1], result["continued"][1], rtol=0, atol=0)


def test_a_checkpoint_of_two_ranks_continues_on_one(results: list[dict[str, Any]], folder: Path) -> None:
    one = engine_of(folder)
    one.load(folder / "from_two")
    assert train(one, make_batch(), 2) == pytest.approx(results[0]["continued"][0], rel=1e-4)


def test_two_ranks_export_the_merged_model_and_whole_adapters(results: list[dict[str, Any]], folder: Path) -> None:
    exported = make_engine(str(folder / "hf"))
    torch.testing.assert_close(weights(exported), results[0]["resumed"][1], rtol=0, atol=0)
    adapter = load_file(folder / "hf" / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj"
    assert adapter[f"{name}.lora_A.weight"].shape == (3, 48) and adapter[f"{name}.lora_B.weight"].shape == (32, 3)
