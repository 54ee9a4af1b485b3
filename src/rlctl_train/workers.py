"""Ray actors: thin shells around one training engine, one rollout engine, or the graders.

Plain classes here; the controller makes actors of them. Every argument that holds tensors arrives as an object
reference, resolved by Ray; `layout` says which global rows each resolved batch holds.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from rlctl_hw.needs import Phase
from rlctl_hw.types import Plan
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlctl_train.algos.correction import corrected
from rlctl_train.batch import Batch, gather, length_mask, pad_rows
from rlctl_train.checkpoint.background import in_background
from rlctl_train.checkpoint.probe import TEMPERATURE, Probe, make_probe, probe_rows
from rlctl_train.checkpoint.shares import HostCopies, Share, Written
from rlctl_train.checkpoint.store import refusals_told
from rlctl_train.checksum import checksum
from rlctl_train.config import RunConfig
from rlctl_train.config.algo import SftConfig
from rlctl_train.config.distill import DistillConfig, TopKSignal
from rlctl_train.config.optim import OptimConfig
from rlctl_train.config.policy import ActorCritic, PolicyGradient, Role
from rlctl_train.config.prime import PrimeConfig
from rlctl_train.device import COLLECTIVES, at_out_of_memory
from rlctl_train.importing import keep_for_good
from rlctl_train.memory_watch import MemoryWatch, Usage
from rlctl_train.prepare import Teacher
from rlctl_train.profiling.allocations import SNAPSHOT
from rlctl_train.profiling.layers import layer_ranges
from rlctl_train.profiling.ranges import mark
from rlctl_train.profiling.recorder import Recordable
from rlctl_train.profiling.snapshots import keep_snapshot
from rlctl_train.registry import ENGINES, LOSSES, ROLLOUTS, load
from rlctl_train.rollout.base import Peers, Sampling
from rlctl_train.stacks import Traceable

Layout = Sequence[Sequence[int]]
Objective = Literal["policy", "value", "supervised", "outcome"]


ENGINE_ROLES = {"teacher": "reference", "reward_model": "actor"}
"""Roles that an engine holds as it does another: a teacher is never trained, a reward model is a policy that is."""


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker is told at birth."""

    config: RunConfig
    plan: Plan
    model_path: str
    tokenizer_path: str
    num_updates: int
    """Optimizer steps of the whole run, for schedules."""
    teacher: Teacher | None = None
    logs: Path | None = None
    """Where workers leave what a person may want to see after a failure."""

    @property
    def device(self) -> str:
        """The torch device type."""
        return "cuda" if self.plan.device in ("cuda", "rocm") else "npu" if self.plan.device == "ascend" else "cpu"

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that ships with the model may run."""
        return self.config.model.type == "pretrained" and self.config.model.trust_remote_code


class EngineWorker(Traceable, Recordable):
    """One rank of one model role."""

    def __init__(self, spec: WorkerSpec, role: Role, rank: int, world: int) -> None:
        torch.set_num_threads(spec.plan.threads_per_worker)
        self._spec, self._role, self._rank, self._world = spec, role, rank, world
        self._store: TCPStore | None = None
        self._memory = MemoryWatch(spec.device, self._parts)
        self._copies, self._writing = HostCopies(), Future[Written]()
        self._probed = Batch({})
        """Rows of the last update."""
        _keep_at_out_of_memory(spec, role, rank)

    def _marking(self) -> AbstractContextManager[object]:
        return layer_ranges(self._engine.layers())

    def open_store(self) -> tuple[str, int]:
        """Open the rendezvous store (rank 0) on a free port and return its address."""
        self._store = _new_store(self._world)
        return self._store.host, self._store.port

    def start(self, store_address: tuple[str, int] | None) -> None:
        """Join the other ranks and load the model."""
        if self._world > 1:
            assert store_address is not None
            store = self._store or TCPStore(*store_address, self._world, is_master=False)
            dist.init_process_group(
                COLLECTIVES[self._spec.device], store=store, rank=self._rank, world_size=self._world
            )
        spec, config = self._spec, self._spec.config
        # Adapters are the student's.
        teacher = spec.teacher if self._role == "teacher" else None
        make = load(ENGINES, config.engine.type)
        keep_for_good()
        self._engine = make(
            model_path=teacher.path if teacher else spec.model_path,
            role=ENGINE_ROLES.get(self._role, self._role),
            config=config.engine,
            lora=None if teacher else config.model.lora,
            savings=spec.plan.savings,
            optim=self._optim(),
            num_updates=spec.num_updates,
            compute_dtype=spec.plan.compute_dtype,
            device=spec.device,
            max_tokens_per_micro_batch=spec.plan.max_tokens_per_micro_batch,
            seed=config.seed,
            trust_remote_code=spec.trust_remote_code,
        )
        self._engine.offload()

    def logprobs(self, rows: list[int], layout: Layout, *parts: Batch) -> Batch:
        """Return column `old_logp` for `rows`, and `sum_pi_squared` where the algorithm reads it."""
        algo, batch = self._spec.config.algo, _assemble(rows, layout, parts)
        with self._at_work("logprobs"):
            if isinstance(algo, PolicyGradient) and algo.needs_sum_pi_squared:
                logp, squares = self._engine.logprobs_and_squares(batch, self._temperature)
                return Batch({"old_logp": logp, "sum_pi_squared": squares})
            logp, _ = self._engine.logprobs(batch, self._temperature)
        return Batch({"old_logp": logp})

    def reference_logprobs(self, rows: list[int], layout: Layout, *parts: Batch) -> Batch:
        """Return column `ref_logp` for `rows`; an actor with adapters answers without them."""
        with self._at_work("logprobs"), self._engine.adapters_off():
            logp, _ = self._engine.logprobs(_assemble(rows, layout, parts), self._temperature)
        return Batch({"ref_logp": logp})

    def reference_distributions(self, rows: list[int], layout: Layout, *parts: Batch) -> tuple[Batch, Batch]:
        """Return column `ref_logp` for `rows` and, apart from it, column `ref_full_logp`, V times as large."""
        with self._at_work("logprobs"), self._engine.adapters_off():
            logp, full = self._engine.full_logprobs(_assemble(rows, layout, parts), self._temperature)
        return Batch({"ref_logp": logp}), Batch({"ref_full_logp": full})

    def teach(self, rows: list[int], layout: Layout, *parts: Batch) -> Batch:
        """Return column `teacher_logp` for `rows`, or `teacher_ids` and `teacher_top_logp`, as the algorithm asks."""
        algo, batch = self._spec.config.algo, _assemble(rows, layout, parts)
        assert isinstance(algo, DistillConfig) and self._spec.teacher is not None
        with self._at_work("logprobs"):
            if not isinstance(algo.signal, TopKSignal):
                logp, _ = self._engine.logprobs(batch, self._temperature)
                return Batch({"teacher_logp": logp})
            ids, logp = self._engine.top_logprobs(
                batch, self._temperature, k=algo.signal.k, num_ids=self._spec.teacher.num_ids
            )
        return Batch({"teacher_ids": ids, "teacher_top_logp": logp})

    def reward_logprobs(self, rows: list[int], layout: Layout, *parts: Batch) -> Batch:
        """Return column `reward_logp` for `rows`."""
        with self._at_work("logprobs"):
            logp, _ = self._engine.logprobs(_assemble(rows, layout, parts), self._temperature)
        return Batch({"reward_logp": logp})

    def values(self, rows: list[int], layout: Layout, *parts: Batch) -> Batch:
        """Return column `values` for `rows`."""
        with self._at_work("values"):
            values = self._engine.values(_assemble(rows, layout, parts))
        return Batch({"values": values})

    def update(
        self, kind: Objective, entropy_coef: float, mini_batches: list[list[int]], layout: Layout, *parts: Batch
    ) -> list[dict[str, float]]:
        """Take one optimizer step per mini-batch (this rank's rows of each); return each step's metrics."""
        objective = self._objective(kind, entropy_coef)
        temperature = 1.0 if kind == "supervised" else self._temperature
        metrics = []
        with self._at_work("critic_update" if kind == "value" else "actor_update"):
            for rows in mini_batches:
                batch = corrected(_assemble(rows, layout, parts))
                if self._role == "actor":
                    self._probed = probe_rows(batch) if len(batch) else self._probed
                step = self._engine.forward_backward(batch, objective, temperature)
                self._memory.count_parts()
                with self._memory.phase("optimizer_step"):
                    metrics.append(step | self._engine.optim_step())
        return metrics

    def loss_sum(self, rows: list[int], layout: Layout, *parts: Batch) -> tuple[float, float]:
        """Return the summed negative log-likelihood of completion tokens and their number, for `rows`."""
        batch = _assemble(rows, layout, parts)
        with self._at_work("logprobs"):
            logp, _ = self._engine.logprobs(batch, 1.0)
        mask = batch["response_mask"]
        return float(-(logp * mask).sum()), float(mask.sum())

    def stream_weights(self, dtype_name: str, folder: Path | None = None) -> Iterator[list[tuple[str, Any]] | str]:
        """Yield the weights in a dtype, bucket by bucket (rank 0; other ranks yield nothing), then the checksum.

        Weights that lie on the host stay there: each comes to the device by itself. With `folder` they are those that
        `export` wrote there, which rank 0 reads alone.
        """
        from rlctl_train.engines.export import read_folder
        from rlctl_train.sync.buckets import Checksum, buckets, pack

        dtype = getattr(torch, dtype_name)
        checksum = Checksum(dtype)
        with self._memory.phase("weight_sync"):
            size = int(self._spec.config.sync.bucket_mib * 2**20)
            weights = self._engine.weights() if folder is None else read_folder(folder)
            for number, bucket in enumerate(buckets(weights, size), start=1):
                if self._rank == 0:
                    with mark(f"bucket {number}"):
                        checksum.add(bucket)
                        packed = pack(bucket, dtype)
                    yield packed
            self._engine.offload()
        if self._rank == 0:
            yield checksum.hexdigest()

    def drain_weights(self, dtype_name: str) -> None:
        """Take part in `stream_weights` of rank 0 without sending anything."""
        for _ in self.stream_weights(dtype_name):
            pass

    def start_update(self) -> None:
        """Prepare to receive weights from another role."""
        self._engine.onload()

    def update_weights(self, bucket: list[tuple[str, Any]]) -> None:
        """Take one bucket; every rank takes them all."""
        from rlctl_train.sync.buckets import unpack

        with self._memory.phase("weight_sync"):
            self._engine.take_weights(unpack(bucket))

    def finish_update(self, version: int) -> str:
        """Return the checksum of the weights now held, in float32 (all ranks take part)."""
        del version  # only what rollout engines sample carries it
        with self._memory.phase("weight_sync"):
            held = checksum(self._engine.weights(), torch.float32)
            self._engine.offload()
        return held

    def save(self, folder: Path) -> None:
        """Begin to write this rank's share of a sharded checkpoint; ask `written` for the end.

        Where the run saves asynchronously, training may go on at once.
        """
        place = folder / self._role
        with self._memory.phase("checkpoint"), refusals_told(folder):
            if self._spec.config.checkpoint.asynchronous:
                share = self._engine.copy_share(place, self._copies)
                self._writing = in_background("write", lambda: _write(share, folder))
            else:
                self._writing = Future()
                self._writing.set_result(self._engine.write_share(place))

    def written(self, wait: bool) -> Written | None:
        """Return what this rank has written since `save`, None while it still writes and is not told to `wait`."""
        return self._writing.result() if wait or self._writing.done() else None

    def state_bytes(self) -> int:
        """Return the bytes that this rank saves."""
        return self._engine.state_bytes()

    def probe(self) -> Probe:
        """Return rows of the last update with the log-probabilities of now (all ranks take part, each has its own)."""
        with self._at_work("logprobs"):
            logp, _ = self._engine.logprobs(self._probed, TEMPERATURE)
        return make_probe(self._probed, logp)

    def load(self, folder: Path) -> None:
        """Read a sharded checkpoint."""
        self._engine.load(folder / self._role)

    def export(self, folder: Path, probe: Probe | None) -> None:
        """Write a Hugging Face folder, and the probe into it (all ranks take part)."""
        with self._at_work("checkpoint"):
            self._engine.export(folder, self._spec.tokenizer_path, probe)

    def memory(self) -> Usage:
        """Return the peaks of this process since the last call."""
        return self._memory.take()

    @contextmanager
    def _at_work(self, phase: Phase) -> Iterator[None]:
        """Have the engine on its device, and measure its memory as the phase's."""
        with self._memory.phase(phase):
            self._engine.onload()
            yield
            self._memory.count_parts()
            self._engine.offload()

    def _parts(self) -> dict[str, int]:
        return self._engine.held_bytes()

    @property
    def _temperature(self) -> float:
        return self._spec.config.rollout.temperature

    def _optim(self) -> OptimConfig | None:
        config = self._spec.config
        if self._role == "critic":
            assert isinstance(config.algo, ActorCritic)
            return config.algo.critic_optim
        if self._role == "reward_model":
            assert isinstance(config.algo, PrimeConfig)
            return config.algo.reward_optim
        return config.trainer.optim if self._role == "actor" else None

    def _objective(self, kind: Objective, entropy_coef: float) -> Any:
        from rlctl_train.algos.objective import PolicyObjective, SupervisedObjective, ValueObjective
        from rlctl_train.algos.prime import OutcomeObjective

        algo = self._spec.config.algo
        if kind == "supervised":
            return SupervisedObjective()
        assert not isinstance(algo, SftConfig)
        if kind == "value":
            assert isinstance(algo, ActorCritic)
            return ValueObjective(algo)
        if kind == "outcome":
            assert isinstance(algo, PrimeConfig)
            return OutcomeObjective(algo)
        loss = load(LOSSES, algo.loss.type)(algo.loss)
        return PolicyObjective(loss, algo, self._spec.config.rollout.max_response_tokens, entropy_coef)


class RolloutWorker(Traceable, Recordable):
    """One rollout engine, or one rank of it where several split the model (`world` of them)."""

    def __init__(self, spec: WorkerSpec, rank: int, world: int) -> None:
        torch.set_num_threads(spec.plan.threads_per_worker)
        self._spec, self._rank, self._world = spec, rank, world
        self._store: TCPStore | None = None
        self._memory = MemoryWatch(spec.device, self._parts)
        _keep_at_out_of_memory(spec, "rollout", rank)

    def open_store(self) -> tuple[str, int]:
        """Open the store in which the engine's ranks meet (rank 0) and return its address."""
        self._store = _new_store(self._world)
        return self._store.host, self._store.port

    def start(self, store_address: tuple[str, int] | None) -> None:
        """Build the engine, together with the other ranks where there are any."""
        spec, config = self._spec, self._spec.config
        peers = None if store_address is None else Peers(self._rank, self._world, *store_address)
        make = load(ROLLOUTS, config.rollout.type)
        keep_for_good()
        self._engine = make(
            spec.model_path,
            config.rollout,
            dtype=spec.plan.rollout_dtype,
            device=spec.device,
            max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            max_concurrent=spec.plan.rollout_max_concurrent,
            gpu_memory_share=spec.plan.rollout_gpu_memory_share,
            trust_remote_code=spec.trust_remote_code,
            peers=peers,
        )

    def generate(
        self, prompts: list[list[int]], groups: list[int], rows: list[int], sampling: Sampling
    ) -> tuple[Batch, np.ndarray]:
        """Sample one response per prompt; return the batch and [S, 2] prompt and response lengths."""
        with self._memory.phase("generation"):
            samples = self._engine.generate(prompts, sampling, rows)
        response_len = torch.tensor([len(s.token_ids) for s in samples])
        seconds = [s.seconds for s in samples if s.seconds is not None]
        timed = {"seconds": torch.tensor(seconds)} if len(seconds) == len(samples) else {}
        response_ids = pad_rows([s.token_ids for s in samples], dtype=torch.long)
        batch = Batch(
            {
                "prompt_ids": pad_rows(prompts, dtype=torch.long),
                "prompt_len": torch.tensor([len(p) for p in prompts]),
                "response_ids": response_ids,
                "response_len": response_len,
                "response_mask": length_mask(response_len, response_ids.shape[1]),
                "rollout_logp": pad_rows([s.logp for s in samples], dtype=torch.float32),
                "group": torch.tensor(groups),
                "row": torch.tensor(rows),
                "policy_version": torch.full((len(samples),), self._engine.version),
                "truncated": torch.tensor([int(s.finish_reason == "length") for s in samples]),
                **timed,
            }
        )
        return batch, torch.stack([batch["prompt_len"], response_len], 1).numpy()

    def follow(self, prompts: list[list[int]], rows: list[int], sampling: Sampling) -> None:
        """Take part in `generate` of rank 0, which has the same samples, without returning anything."""
        with self._memory.phase("generation"):
            self._engine.generate(prompts, sampling, rows)

    def start_update(self) -> None:
        """Prepare to receive weights."""
        with self._memory.phase("weight_sync"):
            self._engine.start_update()

    def update_weights(self, bucket: list[tuple[str, Any]]) -> None:
        """Take one bucket."""
        from rlctl_train.sync.buckets import unpack

        with self._memory.phase("weight_sync"):
            self._engine.update_weights(unpack(bucket))

    def finish_update(self, version: int) -> str:
        """Make the new weights current; return the receiver's checksum."""
        with self._memory.phase("weight_sync"):
            return self._engine.finish_update(version)

    def memory(self) -> Usage:
        """Return the peaks of this process since the last call."""
        return self._memory.take()

    def _parts(self) -> dict[str, int]:
        return self._engine.held_bytes()

    def sleep(self) -> None:
        """Free device memory."""
        self._engine.sleep()

    def wake(self) -> None:
        """Take device memory back."""
        self._engine.wake()


def _keep_at_out_of_memory(spec: WorkerSpec, role: str, rank: int) -> None:
    """Have the allocator's state written to the run's logs at the moment in which memory runs out."""
    if spec.logs is None:
        return
    path = spec.logs / f"out-of-memory-{role}-{rank}{SNAPSHOT}"

    def keep() -> None:
        with suppress(OSError):  # it is the lack of memory that must be told of
            keep_snapshot(spec.device, path)

    at_out_of_memory(spec.device, keep)


def _write(share: Share, folder: Path) -> Written:
    with refusals_told(folder):
        return share.write()


def _assemble(rows: list[int], layout: Layout, parts: Sequence[Batch]) -> Batch:
    return gather(list(zip(layout, parts, strict=True)), rows)


def _new_store(num_ranks: int) -> TCPStore:
    """Open a store on a free port of this node."""
    import ray

    host = ray.util.get_node_ip_address() if ray.is_initialized() else socket.gethostbyname("localhost")
    return TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)
