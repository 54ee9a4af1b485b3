"""ScoreWorker: the CPU actor that turns responses into rewards, and rewards into advantages, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlctl_train.algos.dapo import overlong_penalty
from rlctl_train.algos.gdpo import PART
from rlctl_train.algos.kl_control import KlController
from rlctl_train.algos.mismatch import rollout_correction
from rlctl_train.algos.resample import draw
from rlctl_train.batch import Batch, gather
from rlctl_train.config import RunConfig
from rlctl_train.config.algo import DapoConfig, GdpoConfig, PpoConfig, SftConfig
from rlctl_train.config.errors import UserError
from rlctl_train.importing import keep_for_good
from rlctl_train.profiling.ranges import mark, marked
from rlctl_train.profiling.recorder import Recordable
from rlctl_train.registry import ALGOS, load
from rlctl_train.rewards.pool import Grade, GradedSample, GraderPool
from rlctl_train.stacks import Traceable
from rlctl_train.telemetry.batch_metrics import batch_metrics

if TYPE_CHECKING:  # importing either takes seconds
    from transformers import PreTrainedTokenizerBase

    from rlctl_train.workers import Layout


class ScoreWorker(Traceable, Recordable):
    """Decodes and grades responses, applies the KL penalty, and computes advantages."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase | str) -> None:
        """`tokenizer` may be a path: one whose code comes with it does not travel as an object."""
        torch.set_num_threads(1)
        self._config = config
        self._tokenizer = _load(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._pool = GraderPool(config.reward, config.grader) if config.reward is not None else None
        algo = config.algo
        self._algo = None if isinstance(algo, SftConfig) else load(ALGOS, algo.type)(algo)
        penalty = None if isinstance(algo, SftConfig) else algo.kl_in_reward
        self._correction = None if isinstance(algo, SftConfig) else algo.correction
        self._kl = None if penalty is None else KlController(penalty)
        longest = config.rollout.max_response_tokens
        self._overlong = overlong_penalty(algo, longest) if isinstance(algo, DapoConfig) else None
        keep_for_good()

    @marked("score")
    def score(
        self, rows: list[int], records: list[dict[str, Any]], layout: Layout, *parts: Batch
    ) -> tuple[Batch, dict[str, float]]:
        """Grade every row; return columns `score` [S] and `rewards` [S, T] (on the last token), and metrics."""
        assert self._pool is not None
        batch = gather(list(zip(layout, parts, strict=True)), rows)
        samples = [
            GradedSample(
                response=self._text(batch, i),
                ground_truth=record["ground_truth"],
                data_source=record["data_source"],
                extra=record["extra_info"],
            )
            for i, record in enumerate(records)
        ]
        with mark("grading"):
            grades = self._pool.score(samples)
        score = torch.tensor([grade.score for grade in grades])
        correct = torch.tensor([_is_right(grade) for grade in grades]).float()
        rewards = torch.zeros(batch["response_mask"].shape)
        rewards[torch.arange(len(grades)), batch["response_len"] - 1] = score
        graded = [
            {
                **record,
                "response_text": sample.response,
                "score": grade.score,
                "accuracy": grade.accuracy,
                "reason": grade.reason,
            }
            for record, sample, grade in zip(records, samples, grades, strict=True)
        ]
        columns = {"score": score, "correct": correct, "rewards": rewards, **self._parts(grades)}
        return Batch(columns, tuple(graded)), _grade_metrics(grades)

    def greedy_baseline(
        self, records: list[dict[str, Any]], group_size: int, layout: Layout, *parts: Batch
    ) -> tuple[Batch, dict[str, float]]:
        """Grade one greedy response a prompt; return column `baseline` [S], the score for each of its group, and
        metrics."""
        graded, metrics = self.score(list(range(len(records))), records, layout, *parts)
        score = graded["score"]
        return Batch({"baseline": score.repeat_interleave(group_size)}), {
            "reward/errors": metrics["reward/errors"],
            "reward/greedy_baseline": float(score.mean()),
        }

    @marked("resample")
    def resample(self, rows: list[int], seed: int, layout: Layout, *parts: Batch) -> list[int]:
        """Return the rows to learn from, drawn with replacement by `score`."""
        algo = self._config.algo
        assert isinstance(algo, PpoConfig) and algo.resample is not None
        batch = gather(list(zip(layout, parts, strict=True)), rows)
        return [rows[i] for i in draw(batch["score"], algo.resample, seed)]

    def scores(self, scored: Batch) -> list[float]:
        """Return the scores of what `score` returned, row by row."""
        return scored["score"].tolist()

    def outcomes(self, scored: Batch) -> list[float]:
        """Return 1 for what `score` found right and 0 for the rest, row by row."""
        return scored["correct"].tolist()

    @marked("advantages")
    def advantages(self, rows: list[int], layout: Layout, *parts: Batch) -> tuple[Batch, dict[str, float]]:
        """Return columns `rewards`, `advantages` (and `returns`), and the metrics of the whole batch."""
        assert self._algo is not None
        batch = gather(list(zip(layout, parts, strict=True)), rows)
        corrections, metrics = rollout_correction(batch, self._correction)
        batch = batch.with_columns(**corrections)
        if self._correction is not None and self._correction.mode == "bypass":
            batch = batch.with_columns(old_logp=batch["rollout_logp"])
        if self._overlong is not None:
            rewards, metrics["reward/overlong_penalty"] = self._overlong.apply(batch)
            batch = batch.with_columns(rewards=rewards)
        if self._kl is not None:
            rewards, kl = self._kl.apply(batch)
            metrics |= {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": self._kl.coef}
            self._kl.update(kl, len(batch))
            batch = batch.with_columns(rewards=rewards)
        result = self._algo.advantages(batch)
        columns: dict[str, Tensor] = {"advantages": result.advantages, **corrections}
        if result.returns is not None:
            columns["returns"] = result.returns
        batch = batch.with_columns(**columns)
        metrics |= batch_metrics(batch)
        return Batch(columns), metrics

    def state(self) -> dict[str, Any]:
        """Return what must survive a resume."""
        return {} if self._kl is None else self._kl.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        if self._kl is not None:
            self._kl.load_state(state)

    def _parts(self, grades: Sequence[Grade]) -> dict[str, Tensor]:
        """Return the columns [S] of those parts of the reward that the algorithm reads by name."""
        algo = self._config.algo
        if not isinstance(algo, GdpoConfig):
            return {}
        known = sorted({name for grade in grades for name in grade.parts})
        unknown = [name for name in algo.parts if name not in known]
        if unknown and known:
            raise UserError(
                f"algo.parts names {unknown[0]!r}, but the reward has the parts {', '.join(known)}",
                "name parts as `reward/<part>` in the metrics does",
            )
        return {PART + name: torch.tensor([g.parts.get(name, 0.0) for g in grades]) for name in algo.parts}

    def _text(self, batch: Batch, row: int) -> str:
        ids = batch["response_ids"][row, : int(batch["response_len"][row])].tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _is_right(grade: Grade) -> bool:
    return grade.score > 0 if grade.correct is None else grade.correct


def _grade_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    metrics = {"reward/errors": float(sum(grade.error is not None for grade in grades))}
    for name in sorted({name for grade in grades for name in grade.parts}):
        metrics[f"reward/{name}"] = sum(grade.parts.get(name, 0.0) for grade in grades) / len(grades)
    return metrics


def _load(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
