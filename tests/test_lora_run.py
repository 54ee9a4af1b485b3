"""A whole run with adapters through Ray: warm start of every weight, then adapters alone, with no reference model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.placement import lay_out
from rlctl_train.prepare import prepare
from tests import runs

KL = {"type": "ppo", "group_size": 2, "critic_optim": {"lr": 1e-3}, "kl_loss_coef": 0.05}


def test_no_device_is_given_to_a_reference() -> None:
    config = RunConfig.model_validate(
        {**runs.CONFIG, "algo": KL, "model": {**runs.CONFIG["model"], "lora": {"rank": 2}}}
    )
    assert set(lay_out(runs.PLAN, config).slots) == {"actor", "critic", "rollout"}
    without = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    assert set(lay_out(runs.PLAN, without).slots) == {"actor", "critic", "reference", "rollout"}


def test_an_unknown_layer_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    lora = {"rank": 2, "target_modules": ["query"]}
    files = runs.make_run(tmp_path / "run", model={**runs.CONFIG["model"], "lora": lora}, warm_start={"num_steps": 3})
    config = RunConfig.model_validate_json(files.config.read_text())
    with pytest.raises(UserError, match="names 'query'") as caught:
        prepare(files, config)
    assert "q_proj" in caught.value.remedy


@pytest.mark.long
def test_adapters_learn_beside_the_warm_started_weights(tmp_path: Path) -> None:
    files = runs.make_run(
        tmp_path / "run",
        plan={"trainer_devices": 2},
        model={**runs.CONFIG["model"], "lora": {"rank": 2, "alpha": 4}},
        algo=KL,
        trainer={"num_steps": 4, "mini_batches_per_step": 2, "optim": {"lr": 1e-2}},
        warm_start={"num_steps": 3},
    )
    assert runs.run(files) == 0, runs.log(files)
    steps = runs.lines(files)
    assert all(line["health/logprob_gap"] < 1e-4 for line in steps), "merged weights sample as the adapters compute"
    assert steps[0]["actor/kl_loss"] < steps[-1]["actor/kl_loss"]
    assert not any("reference" in name for name in json.loads((files.logs / "workers.json").read_text()))
    base = load_file(files.root / "warm_start" / "hf" / "model.safetensors")
    assert not (files.root / "warm_start" / "hf" / "adapter").exists()
    adapter = load_file(files.hf / "adapter" / "adapter_model.safetensors")
    merged = load_file(files.hf / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{layer}.weight"], base[f"{layer}.weight"] + 2 * up @ down)
    assert float(up.abs().max()) > 0
    torch.testing.assert_close(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"], rtol=0, atol=0)
