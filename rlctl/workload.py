"""What a run asks of the hardware: RunConfig and the model's shape, in the planner's words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlctl_hw.model_catalogue import known_ids, known_shape
from rlctl_hw.model_shape import shape_from_config, shape_from_file
from rlctl_hw.types import ModelShape, Pins, Workload

from rlctl_train.config import RunConfig
from rlctl_train.config.algo import DapoConfig, SftConfig
from rlctl_train.config.critic_free import RemaxConfig
from rlctl_train.config.distill import DistillConfig
from rlctl_train.config.engine import EngineConfig, Fsdp2Config
from rlctl_train.config.errors import UserError
from rlctl_train.config.model import RandomModel
from rlctl_train.config.preference import SpinConfig
from rlctl_train.config.prime import PrimeConfig
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.config.vocab import VOCAB

LOGITS_CHUNK_TOKENS = 1024


def shape_of(config: RunConfig) -> ModelShape:
    """Return the shape of the run's model: a random one, a folder, a built-in one, or one of the hub."""
    model = config.model
    if isinstance(model, RandomModel):
        return shape_from_config(_random_config(model))
    return _shape_at("model.path", model.path, model.revision)


def teacher_shape(config: RunConfig) -> ModelShape | None:
    """Return the shape of the teacher that the run's algorithm asks; None where it asks none.

    A folder that is not there, such as the result of a run yet to be made, is planned for as one of the run's own
    shape: the run itself will not start without it.
    """
    if not isinstance(config.algo, DistillConfig):
        return None
    path = config.algo.teacher_path
    if _is_folder_name(path) and not Path(path).expanduser().is_dir():
        return shape_of(config)
    return _shape_at("algo.teacher_path", path, None)


def workload_from_config(config: RunConfig, shape: ModelShape) -> Workload:
    """Return the run's sizes and roles; what the user set of the planner's numbers becomes a pin."""
    algo, rollout, engine = config.algo, config.rollout, config.engine
    vllm = rollout if isinstance(rollout, VllmRollout) else None
    return Workload(
        shape=shape,
        roles=config.roles(),
        teacher=teacher_shape(config),
        group_size=1 if isinstance(algo, SftConfig) else algo.group_size,
        prompts_per_step=config.trainer.prompts_per_step,
        mini_batches=config.trainer.mini_batches_per_step,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=rollout.max_response_tokens,
        rollout=rollout.type,
        placement=config.placement,
        bucket_mib=config.sync.bucket_mib,
        kv_cache_gib=vllm.kv_cache_gib if vllm else 0.0,
        engine=engine.type,
        lora_rank=config.model.lora.rank if config.model.lora else 0,
        has_reference="reference" in algo.roles(),
        copied_roles=_copied_roles(config),
        full_kl=not isinstance(algo, SftConfig) and algo.compares_distributions(),
        rollout_needed=config.reward is not None,
        has_old_logprobs=config.old_logprobs_needed(),
        reads_ahead=not isinstance(algo, SftConfig) and algo.loss.reads_ahead,
        greedy_responses=1 if isinstance(algo, RemaxConfig) else 0,
        max_rounds=algo.max_rounds if isinstance(algo, DapoConfig | PrimeConfig) else 1,
        epochs=config.trainer.epochs_per_step,
        logits_chunk_tokens=engine.logits_chunk_tokens if isinstance(engine, Fsdp2Config) else LOGITS_CHUNK_TOKENS,
        pins=replace(
            _engine_pins(engine),
            rollout_dtype=rollout.dtype,
            trainer_devices=config.trainer.num_devices,
            rollout_devices=rollout.num_devices,
            threads_per_worker=config.trainer.threads_per_worker,
            max_concurrent=rollout.max_concurrent,
            gpu_memory_share=vllm.gpu_memory_share if vllm else None,
            object_store_gib=config.ray.object_store_gib,
            rollout_tensor_parallel=vllm.tensor_parallel if vllm else None,
        ),
    )


def _copied_roles(config: RunConfig) -> tuple[str, ...]:
    """Return the roles that are saved while training goes on: those that are trained, and a refreshed reference."""
    if not (config.checkpoint.asynchronous and config.checkpoint.every_steps):
        return ()
    refreshed = isinstance(config.algo, SpinConfig) and config.algo.refresh_every_steps > 0
    saved = ("actor", "critic", "reward_model", *(("reference",) if refreshed else ()))
    return tuple(role for role in config.roles() if role in saved)


def _engine_pins(engine: EngineConfig) -> Pins:
    pins = Pins(
        compute_dtype=engine.compute_dtype,
        max_tokens_per_micro_batch=engine.max_tokens_per_micro_batch,
        offload_params=engine.offload_params,
        offload_optimizer=engine.offload_optimizer,
    )
    if isinstance(engine, Fsdp2Config):
        recompute = {None: None, True: "full", False: "none"}[engine.gradient_checkpointing]
        return replace(pins, recompute=recompute, reshard_after_forward=engine.reshard_after_forward)
    return replace(
        pins,
        recompute=engine.recompute,
        host_optimizer_share=engine.host_optimizer_share,
        tensor_parallel=engine.tensor_parallel,
        pipeline_parallel=engine.pipeline_parallel,
        context_parallel=engine.context_parallel,
        expert_parallel=engine.expert_parallel,
        sequence_parallel=engine.sequence_parallel,
    )


def _random_config(model: RandomModel) -> dict[str, Any]:
    return {
        "model_type": model.architecture,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.hidden_size // model.num_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position,
        "vocab_size": len(VOCAB),
        "tie_word_embeddings": model.tie_embeddings,
    }


def _shape_at(key: str, path: str, revision: str | None) -> ModelShape:
    """Return the shape of the model that a setting names: a folder, a built-in one, or one of the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _shape_of_file(key, folder / "config.json")
    known = known_shape(path) if revision is None else None
    return known or _shape_of_file(key, _hub_config(key, path, revision))


def _shape_of_file(key: str, file: Path) -> ModelShape:
    try:
        return shape_from_file(file)
    except FileNotFoundError as error:
        raise UserError(
            f"{key}: no config.json in {file.parent}", "give a folder that holds a Hugging Face model"
        ) from error
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read: {error}", "write the model folder anew") from error
    except ValueError as error:
        raise UserError(f"{key}: {file}: {error}", "choose a model of one of these architectures") from error


def _hub_config(key: str, path: str, revision: str | None) -> Path:
    """Return config.json from the hub or from its cache."""
    way_out = f"give a folder with config.json, or one of {', '.join(known_ids())}"
    if _is_folder_name(path):
        raise UserError(f"{key}: no such folder: {path}", way_out)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f"{key}={path}: the size of this model is not built in and the hub client is not installed",
            f"{way_out}, or pip install 'rlctl[train]'",
        ) from error
    try:
        return Path(hf_hub_download(path, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}={path}: config.json is not in the hub's reach: {reason}", way_out) from error


def _is_folder_name(path: str) -> bool:
    """Say whether a path cannot name a model of the hub."""
    return Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
