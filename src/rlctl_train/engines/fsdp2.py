"""The FSDP2 engine: forward and backward over packed passes, optimizer steps, weights in and out.

Results do not depend on how a mini-batch was cut into passes or spread over ranks: objectives divide by counts over
the whole mini-batch, and gradients are sums. Every method is collective: all ranks call it, with the rows each has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rlctl_hw.types import Savings
from torch import Tensor, nn
from transformers import AutoConfig

from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.algos.ops import Counts, TokenOutputs, count
from rlctl_train.batch import Batch
from rlctl_train.checkpoint.probe import Probe
from rlctl_train.checkpoint.sharded import load_sharded, save_sharded, stored_names
from rlctl_train.checkpoint.shares import HostCopies, Share, Written, agree
from rlctl_train.config.engine import Fsdp2Config
from rlctl_train.config.errors import FAILED, UserError
from rlctl_train.config.model import LoraConfig
from rlctl_train.config.optim import OptimConfig
from rlctl_train.data.balance import workload
from rlctl_train.device import current, has_varlen_attention, random_state, release_cache, set_random_state
from rlctl_train.engines.adapters import fingerprint, merged, peft_settings, peft_tensors
from rlctl_train.engines.export import write_folder
from rlctl_train.engines.logits import Top
from rlctl_train.engines.lora import adapters_off
from rlctl_train.engines.models import Decoder, Policy, Role, load_model
from rlctl_train.engines.optimizer import ShardedAdamW
from rlctl_train.engines.packing import Pass, cut, lay_out
from rlctl_train.engines.sharding import (
    fill,
    full,
    gather_over_ranks,
    let_go,
    local,
    max_over_ranks,
    num_ranks,
    rank,
    shard,
    sum_over_ranks,
)
from rlctl_train.profiling.ranges import mark

Objective = Callable[[TokenOutputs, Batch, Counts], tuple[Tensor, dict[str, Tensor]]]

HOST = torch.device("cpu")
NO_ANSWERS = torch.zeros(0, 1)
"""What a rank without rows answers."""
NOTHING = Batch(
    {
        "prompt_ids": torch.zeros(1, 1, dtype=torch.long),
        "prompt_len": torch.ones(1, dtype=torch.long),
        "response_ids": torch.zeros(1, 1, dtype=torch.long),
        "response_len": torch.ones(1, dtype=torch.long),
        "response_mask": torch.ones(1, 1),
    }
)
"""A row to run for the sake of communication alone."""


class Fsdp2Engine:
    """One rank of one model. `torch.distributed` is up before it is made, if there is more than one rank."""

    def __init__(
        self,
        *,
        model_path: str,
        role: Role,
        config: Fsdp2Config,
        lora: LoraConfig | None,
        savings: Savings,
        optim: OptimConfig | None,
        num_updates: int,
        compute_dtype: Literal["float32", "bfloat16"],
        device: str,
        max_tokens_per_micro_batch: int,
        seed: int,
        trust_remote_code: bool,
    ) -> None:
        torch.manual_seed(seed)
        self._config, self._savings, self._budget = config, savings, max_tokens_per_micro_batch
        self._path, self._trust, self._lora = model_path, trust_remote_code, lora
        self._away = False
        self._device, self._dtype = current(device), getattr(torch, compute_dtype)
        self._model = self._load(role, seed)
        # Taken before the first pass: after it, a layer may stand there gathered.
        self._weights = dict(self._model.named_weights())
        self._parameters = self._weights if lora is None else dict(self._model.named_trained())
        self._fingerprint: Tensor | None = None
        self._optimizer: ShardedAdamW | None = None
        if optim is not None and role != "reference":
            self.reset_optimizer(optim, num_updates)

    def adapters_off(self) -> AbstractContextManager[None]:
        """Answer, within the block, as the model does without its adapters; without any, as ever."""
        return adapters_off(self._model)

    def logprobs(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of each unmasked token, [S, T] each on the host; 0 elsewhere."""
        answers = self._answers(batch, temperature)
        return answers.get("logp", NO_ANSWERS), answers.get("entropy", NO_ANSWERS)

    def logprobs_and_squares(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probability of each unmasked token and the sum over the vocabulary of squared probabilities where
        it was drawn, [S, T] each on the host; 0 elsewhere."""
        answers = self._answers(batch, temperature, wants_squares=True)
        return answers.get("logp", NO_ANSWERS), answers.get("sum_pi_squared", NO_ANSWERS)

    def top_logprobs(self, batch: Batch, temperature: float, *, k: int, num_ids: int) -> tuple[Tensor, Tensor]:
        """Return the at most `k` likeliest of the first `num_ids` tokens at the place of each unmasked token, and their
        log-probabilities, [S, T, K] each on the host; 0 elsewhere."""
        answers = self._answers(batch, temperature, top=Top(k, num_ids))
        nothing = NO_ANSWERS[..., None]
        return answers.get("top_ids", nothing.long()), answers.get("top_logp", nothing)

    def full_logprobs(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probability of each unmasked token, [S, T], and those of the whole vocabulary in its place,
        [S, T, V], on the host; 0 elsewhere."""
        answers = self._answers(batch, temperature, wants_full=True)
        return answers.get("logp", NO_ANSWERS), answers.get("full_logp", NO_ANSWERS[..., None])

    def values(self, batch: Batch) -> Tensor:
        """Return the value of the state before each unmasked token, [S, T] on the host; 0 elsewhere."""
        return self._answers(batch, 1.0).get("values", NO_ANSWERS)

    def forward_backward(self, batch: Batch, objective: Objective, temperature: float = 1.0) -> dict[str, float]:
        """Add the gradient of the objective over the mini-batch of all ranks; return its metrics over all ranks.

        Logits are divided by `temperature` before the softmax. Ranks may hold different numbers of rows, also none.
        A batch with `teacher_ids` is asked for their log-probabilities too, one with `ref_full_logp` for the KL to it.
        An objective that needs statistics of the whole mini-batch costs a pass without gradients before it.
        """
        counts = self._counts(batch)
        if isinstance(objective, PolicyObjective) and objective.needs_statistics:
            logp, _ = self.logprobs(batch, temperature)
            batch = batch.with_columns(**objective.statistics(logp, batch, gather_over_ranks))
        shares: list[dict[str, Tensor]] = []
        for number, rows in enumerate(self._cut(batch), start=1):
            with mark(f"micro-batch {number}"):
                if not rows:
                    self._empty_pass(temperature)
                    continue
                with mark("forward"):
                    micro = batch.rows(rows)
                    asked = _with_reference(self._lay_out(micro), micro)
                    there = {name: c.to(self._device) for name, c in micro.columns.items() if name != "ref_full_logp"}
                    micro = Batch(there, micro.records)
                    answers = self._ask(_with_candidates(asked, micro), temperature)
                with mark("loss"):
                    loss, metrics = objective(_in_place(answers, asked, micro), micro, counts)
                with mark("backward"):
                    loss.backward()
                shares.append(metrics)
        return _add_up(shares)

    def optim_step(self) -> dict[str, float]:
        """Clip the gradient, take one optimizer step and drop the gradient; return `grad_norm`, `lr` and `skipped`."""
        assert self._optimizer is not None, "this engine was made without an optimizer"
        if self._savings.offload_optimizer:
            self._optimizer.move_state(self._device)
        metrics = self._optimizer.step()
        if self._savings.offload_optimizer:
            self._optimizer.move_state(HOST)
        return metrics

    def reset_optimizer(self, optim: OptimConfig, num_updates: int) -> None:
        """Start with a new optimizer and schedule."""
        self._optimizer = ShardedAdamW(self._parameters, optim, num_updates, self._device)
        if self._savings.offload_optimizer:
            self._optimizer.move_state(HOST)

    def layers(self) -> list[nn.Module]:
        """Return the decoder layers, first to last."""
        return self._model.layers

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight whole, under its Hugging Face name, tied ones once, one at a time.

        What `offload` moved to the host comes back one weight at a time.
        """
        for name, weight in self._weights.items():
            whole = full(weight.detach().to(self._device))
            yield name, whole if self._lora is None else merged(name, whole, self._parameters, self._lora)

    def take_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write whole tensors, under the names that `weights` gives them, over the weights; all go to every rank."""
        let_go(self._model)
        for name, whole in tensors:
            fill(self._weights[name], whole)

    def offload(self) -> None:
        """Give cached device memory back; move parameters to the host, if the plan says so, until `onload`."""
        if self._savings.offload_params and not self._away:
            self._move(HOST)
            self._away = True
        release_cache(self._device)

    def onload(self) -> None:
        """Take back what `offload` moved."""
        if self._away:
            self._move(self._device)
            self._away = False

    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer, schedule and random state, each rank its share."""
        with self._everything_on_device():
            save_sharded(self._saved(), Path(folder))

    def write_share(self, folder: Path) -> Written:
        """Write this rank's share of what `save` writes; loadable when the shares of all ranks are sealed together."""
        with self._everything_on_device():
            return agree(self._saved(), Path(folder)).write()

    def copy_share(self, folder: Path, copies: HostCopies) -> Share:
        """Copy this rank's share of what `save` writes to the host, to be written at any time by any thread."""
        with self._everything_on_device():
            return agree(self._saved(), Path(folder), copies)

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes of weights, gradients and optimizer state that are on this rank's device now."""
        weights = {id(weight): weight for weight in chain(self._weights.values(), self._parameters.values())}
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        moments = [] if self._optimizer is None else self._optimizer.moments()
        parts = {"weights": weights.values(), "gradients": gradients, "optimizer": moments}
        return {
            part: sum(shard.nbytes for tensor in tensors if (shard := local(tensor)).device == self._device)
            for part, tensors in parts.items()
        }

    def state_bytes(self) -> int:
        """Return the bytes that this rank saves."""
        return sum(local(tensor).nbytes for tensor in self._saved().values())

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, from any number of ranks; ranks that were not there keep their random state."""
        stored = stored_names(Path(folder))
        random_states = {name: state for name, state in self._random_states().items() if name in stored}
        with self._everything_on_device():
            self._check_base(Path(folder))
            state = self._state()
            load_sharded(state | random_states, Path(folder))
        if self._optimizer is not None:
            self._optimizer.after_load(int(state["schedule"]))
        for name, value in random_states.items():
            set_random_state(torch.device(name.split(".")[1]), value)

    def export(self, folder: Path, tokenizer: str | None = None, probe: Probe | None = None) -> None:
        """Write a Hugging Face folder from the float32 weights, in the dtype the model came with.

        `tokenizer` is the folder or hub id of the tokenizer, where it is not the model's own; `probe` goes along.
        Adapters are merged into the weights, and lie apart from them in the folder `adapter` below, as the PEFT library
        reads it.
        """
        adapter = None
        if self._lora is not None:
            adapter = peft_settings(self._lora, self._path, self._parameters), peft_tensors(self._parameters)
        if rank() > 0:
            for _ in chain(self.weights(), adapter[1] if adapter else ()):
                pass
        else:
            source = AutoConfig.from_pretrained(self._path, trust_remote_code=self._trust)
            own_dtype = source.dtype if isinstance(source.dtype, torch.dtype) else torch.float32
            write_folder(
                Path(folder), self.weights(), self._model.lm,
                dtype=own_dtype, source=self._path, tokenizer=tokenizer or self._path, trust_remote_code=self._trust,
                adapter=adapter, probe=probe,
            )  # fmt: skip
        if num_ranks() > 1:
            dist.barrier()

    def _load(self, role: Role, seed: int) -> Decoder:
        model = load_model(
            self._path, role, read_weights=rank() == 0, trust_remote_code=self._trust,
            lora=self._lora, frozen_dtype=self._dtype, seed=seed,
        )  # fmt: skip
        if self._savings.recompute == "full":
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # One rank shards nothing, and mixed precision is FSDP's work only where weights in float32 are trained.
        if num_ranks() == 1 and (self._dtype == torch.float32 or self._lora is not None):
            return model.to(self._device)
        shard(model, self._device, self._dtype, self._savings.reshard_after_forward)
        return model

    def _ask(
        self,
        asked: Pass,
        temperature: float,
        *,
        wants_squares: bool = False,
        top: Top | None = None,
        wants_full: bool = False,
    ) -> TokenOutputs:
        """Run the model on one pass; answers are [R], [R, K] or, on the host, [R, V].

        Targets after the first of a place are candidates.
        """
        if not isinstance(self._model, Policy):
            return TokenOutputs(values=self._model(asked))
        answers = self._model(asked, temperature, self._config.logits_chunk_tokens, wants_squares, top, wants_full)
        if top is not None:
            return TokenOutputs(top_ids=answers[0], top_logp=answers[1])
        if wants_full:
            return TokenOutputs(logp=answers[0], full_logp=answers[1])
        logp, entropy, *more = answers
        squares, kl = (more[0] if more and wanted else None for wanted in (wants_squares, not wants_squares))
        made = TokenOutputs(logp=logp, entropy=entropy, sum_pi_squared=squares, ref_kl=kl)
        return made if asked.targets.ndim == 1 else replace(made, logp=logp[:, 0], top_logp=logp[:, 1:])

    def _answers(self, batch: Batch, temperature: float, **wanted: Any) -> dict[str, Tensor]:
        """Run the model on all rows without gradients; each answer is [S, T], [S, T, K] or [S, T, V] on the host.

        `wanted` is what `_ask` may be asked beside log-probabilities.
        """
        answers: dict[str, Tensor] = {}
        with torch.no_grad():
            for number, rows in enumerate(self._cut(batch), start=1):
                micro = batch.rows(rows) if rows else NOTHING
                with mark(f"micro-batch {number}"):
                    asked = self._lay_out(micro)
                    outputs = vars(_in_place(self._ask(asked, temperature, **wanted), asked, micro))
                if rows:
                    for name, value in outputs.items():
                        if value is not None:
                            shape = len(batch), *value.shape[1:]
                            answer = answers.setdefault(name, torch.zeros(shape, dtype=value.dtype))
                            answer[rows] = value.cpu()
        return answers

    def _empty_pass(self, temperature: float) -> None:
        """Take part in the communication of a pass for which this rank has no rows."""
        outputs = self._ask(self._lay_out(NOTHING), temperature)
        answer = outputs.values if outputs.logp is None else outputs.logp
        assert answer is not None
        (answer.sum() * 0.0).backward()

    def _cut(self, batch: Batch) -> list[list[int]]:
        """Cut this rank's rows into passes, as many on every rank; a rank that has fewer gets empty ones."""
        num_passes = 0
        while True:
            parts = self._cut_own(batch, num_passes)
            agreed = max_over_ranks(len(parts), self._device)
            if num_ranks() == 1 or agreed == num_passes:
                return parts
            num_passes = agreed

    def _cut_own(self, batch: Batch, min_parts: int) -> list[list[int]]:
        if not len(batch):
            return [[]] * min_parts
        return cut(batch, self._budget, min_parts, packed=self._config.packing, workload=self._workload)

    def _lay_out(self, micro: Batch) -> Pass:
        dense = has_varlen_attention(self._device, self._dtype)
        return lay_out(micro, packed=self._config.packing, dense_slots=dense, device=self._device)

    def _workload(self, length: int) -> float:
        return workload(length, self._model.num_matrix_parameters, self._model.attention_width)

    def _counts(self, batch: Batch) -> Counts:
        own = count(batch["response_mask"], batch.columns.get("correct")) if len(batch) else Counts(0.0, 0.0)
        every = torch.tensor(list(vars(own).values()), dtype=torch.float64, device=self._device)
        return Counts(*sum_over_ranks(every).tolist())

    def _move(self, device: torch.device) -> None:
        self._model.to(device)
        if self._optimizer is not None:
            self._optimizer.rebind()

    @contextmanager
    def _everything_on_device(self) -> Iterator[None]:
        was_away = self._away
        self.onload()
        if self._optimizer is not None:
            self._optimizer.move_state(self._device)
        yield
        if self._optimizer is not None and self._savings.offload_optimizer:
            self._optimizer.move_state(HOST)
        if was_away:
            self.offload()

    def _base(self) -> dict[str, Tensor]:
        """Return the fingerprint of the frozen weights, which are not saved; nothing where all are trained."""
        if self._lora is None:
            return {}
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._weights)
        return {"base": self._fingerprint}

    def _check_base(self, folder: Path) -> None:
        """Refuse adapters that were trained beside other weights than these."""
        if self._lora is None:
            return
        here = self._base()
        stored = {name: torch.zeros_like(value) for name, value in here.items()}
        load_sharded(stored, folder)
        if not torch.equal(stored["base"], here["base"]):
            raise UserError(
                f"the weights in {self._path} are not those that the adapters in {folder} were trained beside",
                "put the weights back that the run began with, or start a new run",
                exit_code=FAILED,
            )

    def _state(self) -> dict[str, Tensor]:
        """Return trained weights and optimizer state by name, sharing memory with them."""
        weights = {f"model.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        return weights | (self._optimizer.state() if self._optimizer is not None else {})

    def _saved(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds, by name."""
        return self._state() | self._base() | self._random_states()

    def _random_states(self) -> dict[str, Tensor]:
        return {f"rng.{d.type}.{rank()}": random_state(d) for d in {HOST, self._device}}


def _with_candidates(asked: Pass, micro: Batch) -> Pass:
    """Ask also for the log-probabilities of `teacher_ids` [S, T, K], where the batch has them."""
    if "teacher_ids" not in micro:
        return asked
    candidates = micro["teacher_ids"].flatten(0, 1)[asked.places]
    return replace(asked, targets=torch.cat([asked.targets[:, None], candidates], 1))


def _with_reference(asked: Pass, micro: Batch) -> Pass:
    """Ask also for the KL to `ref_full_logp` [S, T, V], where the batch has it; it stays on the host."""
    if "ref_full_logp" not in micro:
        return asked
    return replace(asked, ref_full_logp=micro["ref_full_logp"].flatten(0, 1)[asked.places.cpu()])


def _in_place(outputs: TokenOutputs, asked: Pass, micro: Batch) -> TokenOutputs:
    """Put answers [R, ...] where they belong in [S, T, ...]; 0 elsewhere."""
    shape = micro["response_mask"].shape

    def spread(answer: Tensor | None) -> Tensor | None:
        if answer is None:
            return None
        rest = answer.shape[1:]
        places = asked.places.to(answer.device)
        return answer.new_zeros(shape.numel(), *rest).index_copy(0, places, answer).view(*shape, *rest)

    return TokenOutputs(**{name: spread(answer) for name, answer in vars(outputs).items()})


def _add_up(shares: list[dict[str, Tensor]]) -> dict[str, float]:
    """Add metrics over passes and ranks; a rank without rows has none."""
    own: dict[str, float] = {}
    for name in shares[0] if shares else ():
        own[name] = float(torch.stack([share[name] for share in shares]).sum())
    everyone: list[dict[str, float]] = [own]
    if num_ranks() > 1:
        everyone = [{} for _ in range(num_ranks())]
        dist.all_gather_object(everyone, own)
    total: dict[str, float] = {}
    for metrics in everyone:
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + value
    return total
