"""The controller: implements the verbs of a flow with the workers of a crew.

It handles references, lengths and metrics only; tensors travel between the workers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from rlctl_train.algos.entropy_control import EntropyController
from rlctl_train.batch_ref import BatchRef, Part, choose
from rlctl_train.checkpoint.probe import Probe
from rlctl_train.cluster import collect
from rlctl_train.config.algo import DapoConfig, PpoConfig, SftConfig
from rlctl_train.config.policy import ActorCritic
from rlctl_train.config.preference import SpinConfig
from rlctl_train.config.prime import PrimeConfig
from rlctl_train.crew import Crew
from rlctl_train.data.balance import balance
from rlctl_train.data.loader import PromptRow, supervised_rows
from rlctl_train.fleet import Fleet
from rlctl_train.flops import FROZEN_UPDATE, UPDATE, Flops
from rlctl_train.health import MismatchGates, check_logprob_gap
from rlctl_train.prepare import Materials
from rlctl_train.profiling.ranges import mark
from rlctl_train.rollout.base import Sampling
from rlctl_train.status import Status
from rlctl_train.sync.relay import hand_over
from rlctl_train.workers import WorkerSpec

Metrics = dict[str, float]


class Controller:
    """The verbs of one run."""

    def __init__(
        self,
        crew: Crew,
        fleet: Fleet,
        spec: WorkerSpec,
        materials: Materials,
        status: Status,
        draw: Callable[[int], list[PromptRow]],
    ) -> None:
        self._spec, self._config, self._materials, self._status = spec, spec.config, materials, status
        self._crew, self._fleet, self._draw = crew, fleet, draw
        self._gates = MismatchGates(spec.config, spec.plan)
        self._entropy = EntropyController(spec.config.algo)
        self._flops = Flops(spec.plan)
        self.step = 0
        self.first_step = True
        """Whether the next step is the first of this process: its log-probabilities are always compared."""
        self._metrics: Metrics = {}
        self._numbered = (0, 0)
        """A step, and how many rows it has generated so far."""

    # Verbs

    def generate(self, prompts: Sequence[PromptRow]) -> BatchRef:
        """Sample the algorithm's group of responses for each prompt."""
        algo, rollout = self._config.algo, self._config.rollout
        assert not isinstance(algo, SftConfig)
        sampling = Sampling(
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            ignore_eos=rollout.ignore_eos,
            seed=self._config.seed * 1_000_003 + self.step,
        )
        # A step may generate several times: rows go on counting, so that their seeds and groups differ.
        first = self._rows_so_far
        batch = self._sample(prompts, algo.group_size, sampling, first)
        self._numbered = (self.step, first + len(batch))
        self._add("perf/total_num_tokens", float(batch.lengths.sum()))
        self._add("perf/response_tokens", float(batch.lengths[:, 1].sum()))
        return batch

    def sample_greedy(self, prompts: Sequence[PromptRow], temperature: float) -> BatchRef:
        """Sample one response per prompt from the newest weights, with the validation temperature (0 is greedy)."""
        if self._fleet.is_stale:
            self.sync()
        sampling = Sampling(
            self._config.rollout.max_response_tokens, temperature=temperature, seed=-1 - self._config.seed
        )
        return self._sample(prompts, 1, sampling)

    def _sample(
        self, prompts: Sequence[PromptRow], group_size: int, sampling: Sampling, first_row: int = 0
    ) -> BatchRef:
        with self._phase("generate", "gen"):
            batch = self._fleet.sample(prompts, group_size, sampling, first_row)
        self._flops.count("gen", "actor", batch.lengths, group_size)
        return batch

    def score(self, batch: BatchRef) -> BatchRef:
        """Add `score` and `rewards`."""
        with self._phase("score", "reward"):
            rows = list(range(len(batch)))
            ref, metrics = self._crew.scorer.score.options(num_returns=2).remote(
                rows, list(batch.records), *batch.arguments()
            )
            self._add_grades(ray.get(metrics), len(batch))
        return batch.plus(Part(tuple(rows), ref))

    @property
    def max_rounds(self) -> int:
        """The most times a step may generate."""
        assert isinstance(self._config.algo, DapoConfig | PrimeConfig)
        return self._config.algo.max_rounds

    def more_prompts(self, num: int) -> list[PromptRow]:
        """Draw the next prompts of the training data."""
        return self._draw(num)

    def scores(self, batch: BatchRef) -> list[list[float]]:
        """Return the score of every response, one list a prompt."""
        scored = batch.parts[-1]
        scores = ray.get(self._crew.scorer.scores.remote(scored.ref))
        return [scores[i : i + batch.group_size] for i in range(0, len(scores), batch.group_size)]

    @property
    def reward_update(self) -> Literal["before", "after", "none"]:
        """When the reward model learns."""
        assert isinstance(self._config.algo, PrimeConfig)
        return self._config.algo.update

    @property
    def accuracy_bounds(self) -> tuple[float, float]:
        """The smallest and the largest share of right responses of a group to learn from."""
        assert isinstance(self._config.algo, PrimeConfig)
        return self._config.algo.min_accuracy, self._config.algo.max_accuracy

    def accuracies(self, batch: BatchRef) -> list[float]:
        """Return the share of right responses to each prompt."""
        right: list[float] = ray.get(self._crew.scorer.outcomes.remote(batch.parts[-1].ref))
        size = batch.group_size
        return [sum(right[i : i + size]) / size for i in range(0, len(right), size)]

    def update_reward_model(self, batch: BatchRef) -> None:
        """Take the reward model's optimizer steps."""
        with self._phase("update", "update_reward_model"):
            self._metrics |= self._update("reward_model", "outcome", batch, prefix="reward_model")

    def reward_logprobs(self, batch: BatchRef) -> BatchRef:
        """Add `reward_logp`."""
        with self._phase("logprobs", "reward_model"):
            batch = self._on_ranks("reward_model", "reward_logprobs", batch)
        self._flops.count("reward_model", "reward_model", batch.lengths, batch.group_size)
        return batch

    def choose(self, groups: Sequence[tuple[BatchRef, Sequence[int]]]) -> BatchRef:
        """Make one batch of the named groups of several batches, in the order given."""
        return choose(groups)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add metrics of the step."""
        self._metrics |= metrics

    def logprobs(self, batch: BatchRef) -> BatchRef:
        """Add `old_logp` where it is not simply the update's own, and `ref_logp` where there is a reference."""
        algo = self._config.algo
        assert not isinstance(algo, SftConfig)
        if self.first_step or self._config.old_logprobs_needed():
            with self._phase("logprobs", "old_log_prob"):
                batch = self._on_ranks("actor", "logprobs", batch)
            self._flops.count("old_log_prob", "actor", batch.lengths, batch.group_size)
        if "reference" in algo.roles():
            holder = "reference" if "reference" in self._crew.engines else "actor"
            wide = algo.compares_distributions()
            with self._phase("logprobs", "ref"):
                batch = self._on_ranks(
                    holder, "reference_distributions" if wide else "reference_logprobs", batch, wide=wide
                )
            self._flops.count("ref", "reference", batch.lengths, batch.group_size)
        return batch

    def teach(self, batch: BatchRef) -> BatchRef:
        """Add what the teacher says: `teacher_logp`, or `teacher_ids` and `teacher_top_logp`."""
        with self._phase("logprobs", "teacher"):
            batch = self._on_ranks("teacher", "teach", batch)
        self._flops.count("teacher", "teacher", batch.lengths, batch.group_size)
        return batch

    def values(self, batch: BatchRef) -> BatchRef:
        """Add `values` when there is a critic."""
        if "critic" not in self._crew.engines:
            return batch
        with self._phase("values", "values"):
            batch = self._on_ranks("critic", "values", batch)
        self._flops.count("values", "critic", batch.lengths, batch.group_size)
        return batch

    def advantages(self, batch: BatchRef) -> BatchRef:
        """Add `advantages` and `returns`, and check the health of the batch."""
        with self._phase("advantages", "adv"):
            rows = list(range(len(batch)))
            ref, metrics = self._crew.scorer.advantages.options(num_returns=2).remote(rows, *batch.arguments())
            made: Any = ray.get(metrics)
            self._metrics |= made
        self._gates.check(made)
        if self.first_step:
            check_logprob_gap(self._config, self._spec.plan, self._metrics)
            self.first_step = False
        return batch.plus(Part(tuple(rows), ref))

    def greedy_baseline(self, batch: BatchRef, prompts: Sequence[PromptRow]) -> BatchRef:
        """Add `baseline`: the score of one greedy response to each prompt of the batch."""
        rollout = self._config.rollout
        greedy = self._sample(
            prompts, 1, Sampling(rollout.max_response_tokens, temperature=0.0, ignore_eos=rollout.ignore_eos)
        )
        self._add("perf/total_num_tokens", float(greedy.lengths.sum()))
        self._add("perf/response_tokens", float(greedy.lengths[:, 1].sum()))
        with self._phase("score", "reward"):
            ref, metrics = self._crew.scorer.greedy_baseline.options(num_returns=2).remote(
                list(greedy.records), batch.group_size, *greedy.arguments()
            )
            graded: Metrics = ray.get(metrics)
        for name, value in graded.items():
            self._add(name, value)
        return batch.plus(Part(tuple(range(len(batch))), ref))

    def resample(self, batch: BatchRef) -> BatchRef:
        """Choose which responses to learn from, and how often, where the algorithm says so."""
        algo = self._config.algo
        if not isinstance(algo, PpoConfig) or algo.resample is None:
            return batch
        seed = self._config.seed * 1_000_003 + self.step
        rows = ray.get(self._crew.scorer.resample.remote(list(range(len(batch))), seed, *batch.arguments()))
        self._metrics["sampling/distinct_share"] = len(set(rows)) / len(rows)
        return batch.resampled(rows)

    def update_critic(self, batch: BatchRef) -> None:
        """Take the critic's optimizer steps, when there is a critic."""
        if "critic" in self._crew.engines:
            with self._phase("update", "update_critic"):
                self._metrics |= self._update("critic", "value", batch, prefix="critic")

    def update_actor(self, batch: BatchRef) -> None:
        """Take the policy's optimizer steps, unless the critic is still warming up."""
        algo = self._config.algo
        assert not isinstance(algo, SftConfig)
        if isinstance(algo, ActorCritic) and self.step <= algo.critic_warmup_steps:
            return
        with self._phase("update", "update_actor"):
            made = self._update("actor", "policy", batch, prefix="actor")
        if algo.entropy_control is not None:
            made["actor/entropy_coef"] = self._entropy.coef
            self._entropy.update(made["actor/entropy"])
        self._metrics |= made
        if self._updates_per_step == 1:  # with more of them the policy has moved before the last
            self._gates.check(made)

    def read(self, rows: Sequence[PromptRow]) -> BatchRef:
        """Tokenise rows with their given responses."""
        longest = self._config.data.max_prompt_tokens + self._config.rollout.max_response_tokens
        batch = supervised_rows(rows, self._materials.tokenizer, longest)
        lengths = np.stack([batch["prompt_len"].numpy(), batch["response_len"].numpy()], 1)
        self._metrics["perf/total_num_tokens"] = float(lengths.sum())
        part = Part(tuple(range(len(batch))), ray.put(batch))
        return BatchRef((part,), lengths, tuple(row.record for row in rows), group_size=1)

    def update_supervised(self, batch: BatchRef) -> None:
        """Take the optimizer steps of a supervised batch."""
        with self._phase("update", "update_actor"):
            self._metrics |= self._update("actor", "supervised", batch, prefix="actor")

    def loss(self, batch: BatchRef) -> float:
        """Return the mean negative log-likelihood of the completion tokens, in nats per token."""
        actors = self._crew.engines["actor"]
        shares = self._shares(batch, list(range(len(batch))), len(actors))
        sums = collect([a.loss_sum.remote(share, *batch.arguments()) for a, share in zip(actors, shares, strict=True)])
        return sum(loss for loss, _ in sums) / max(1.0, sum(tokens for _, tokens in sums))

    def sync(self) -> None:
        """Hand the policy's weights to the rollout engines and compare checksums."""
        if not self._crew.rollouts:
            return
        with self._phase("sync", "update_weights"):
            self._fleet.take_weights()

    def refresh_reference(self) -> None:
        """Make the policy the reference, in the steps in which the algorithm says so, and compare checksums."""
        algo = self._config.algo
        assert isinstance(algo, SpinConfig)
        if algo.refresh_every_steps and self.step % algo.refresh_every_steps == 0:
            with self._phase("sync", "refresh_reference"):
                actors, references = self._crew.engines["actor"], self._crew.engines["reference"]
                hand_over(actors, references, "float32", self._fleet.version, self._crew.ask)

    # Between steps

    def take_metrics(self) -> Metrics:
        """Return the metrics gathered since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics | self._flops.take(metrics)

    def save(self, folder: Path) -> dict[str, Any]:
        """Begin to write the state of every role that changes; return what else must survive."""
        self._status.update(phase="checkpoint")
        collect([actor.save.remote(folder) for actors in self.writers().values() for actor in actors])
        scorer = {} if self._crew.scorer is None else ray.get(self._crew.scorer.state.remote())
        return {"version": self._fleet.version, "scorer": scorer, "entropy": self._entropy.state()}

    def writers(self) -> dict[str, list[Any]]:
        """Return the ranks of every role that is saved."""
        return {role: self._crew.engines[role] for role in self._changing}

    def state_bytes(self) -> int:
        """Return the bytes of one checkpoint."""
        return sum(collect([actor.state_bytes.remote() for actors in self.writers().values() for actor in actors]))

    def probe(self) -> Probe:
        """Return a few rows of the last update with the policy's log-probabilities of now; none before an update."""
        probes: list[Probe] = collect([actor.probe.remote() for actor in self._crew.engines["actor"]])
        return next((probe for probe in probes if probe["sequences"]), probes[0])

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what `save` wrote."""
        collect([actor.load.remote(folder) for actors in self.writers().values() for actor in actors])
        if self._crew.scorer is not None:
            ray.get(self._crew.scorer.load_state.remote(state["scorer"]))
        self._entropy.load_state(state["entropy"])
        self._fleet.version = state["version"] - 1

    def export(self, folder: Path, probe: Probe | None) -> None:
        """Write the policy as a Hugging Face folder, and the probe into it."""
        with self._phase("export", "export"):
            collect([actor.export.remote(folder, probe) for actor in self._crew.engines["actor"]])

    # Helpers

    def _update(self, role: str, kind: str, batch: BatchRef, *, prefix: str) -> Metrics:
        actors = self._crew.engines[role]
        self._fleet.is_stale |= role == "actor"
        plan = [self._shares(batch, rows, len(actors)) for rows in self._mini_batches(batch)]
        results = collect(
            [
                actor.update.remote(
                    kind, self._entropy.coef, [shares[rank] for shares in plan], *batch.arguments(wide=kind == "policy")
                )
                for rank, actor in enumerate(actors)
            ]
        )[0]
        self._count_update(role, batch)
        names = {name for step in results for name in step}
        means = {name: sum(step[name] for step in results) / len(results) for name in names}
        return {name if "/" in name else f"{prefix}/{name}": value for name, value in means.items()}

    def _count_update(self, role: str, batch: BatchRef) -> None:
        rows = [row for group in batch.learnt_groups() for row in group]
        passes = self._config.trainer.epochs_per_step * (FROZEN_UPDATE if self._config.model.lora else UPDATE)
        self._flops.count(f"update_{role}", role, batch.lengths[rows], batch.group_size, passes)

    def _mini_batches(self, batch: BatchRef) -> list[list[int]]:
        """Cut the batch into mini-batches of whole groups, shuffled by seed, step and epoch when there are several."""
        trainer, groups = self._config.trainer, batch.learnt_groups()
        parts = trainer.mini_batches_per_step
        cut = []
        for epoch in range(trainer.epochs_per_step):
            if parts > 1:
                random.Random(f"{self._config.seed}/{self.step}/{epoch}").shuffle(groups)
            size = len(groups) // parts
            for part in range(parts):
                chosen = groups[part * size : (part + 1) * size]
                cut.append([row for group in chosen for row in group])
        return cut

    def _shares(self, batch: BatchRef, rows: list[int], num_ranks: int) -> list[list[int]]:
        """Spread rows evenly over ranks, whole groups where there are enough: a rank reads a shared prompt once."""
        size = 1 if len(rows) // batch.group_size < num_ranks else batch.group_size
        blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
        lengths = [int(batch.lengths[block].sum()) for block in blocks]
        return [[row for i in share for row in blocks[i]] for share in balance(lengths, num_ranks, equal_size=False)]

    def _on_ranks(self, role: str, verb: str, batch: BatchRef, *, wide: bool = False) -> BatchRef:
        """Add the columns that a verb returns; of a `wide` one, those that it returns second are wide."""
        actors = self._crew.engines[role]
        shares = self._shares(batch, list(range(len(batch))), len(actors))
        made: list[Part] = []
        for actor, share in zip(actors, shares, strict=True):
            returned = getattr(actor, verb).options(num_returns=2 if wide else 1).remote(share, *batch.arguments())
            refs = returned if wide else [returned]
            made += [Part(tuple(share), ref, wide=i > 0) for i, ref in enumerate(refs)]
        # Answered after the verb: the results stay where they are, and the death of one rank is known at once.
        collect([actor.ping.remote() for actor in actors])
        return batch.plus(*made)

    @property
    def _changing(self) -> list[str]:
        """Roles whose weights the run changes: those that are trained, and a reference that is refreshed."""
        algo = self._config.algo
        roles = ["actor", "critic", "reward_model"]
        if isinstance(algo, SpinConfig) and algo.refresh_every_steps:
            roles.append("reference")
        return [role for role in roles if role in self._crew.engines]

    @property
    def _updates_per_step(self) -> int:
        trainer = self._config.trainer
        return trainer.mini_batches_per_step * trainer.epochs_per_step

    @property
    def _rows_so_far(self) -> int:
        step, rows = self._numbered
        return rows if step == self.step else 0

    def _add(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + value

    def _add_grades(self, metrics: Metrics, num_rows: int) -> None:
        """Take in what grading `num_rows` responses showed: errors add up, means become those of the whole step."""
        share = num_rows / max(self._rows_so_far, num_rows)
        for name, value in metrics.items():
            self._add(name, value if name == "reward/errors" else share * (value - self._metrics.get(name, 0.0)))

    @contextmanager
    def _phase(self, phase: str, timing: str) -> Iterator[None]:
        start = time.perf_counter()
        with mark(timing):
            self._status.update(phase=phase)
            self._crew.has_worked = True
            yield
        self._add(f"timing_s/{timing}", time.perf_counter() - start)
