"""Dynamic sampling: which groups a step of DAPO learns from, how often it generates, and what it says of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rlctl_train.flows import dapo

MIXED, EQUAL = [0.0, 1.0], [1.0, 1.0]


@dataclass
class FakeRun:
    """A run whose prompts are numbers; `outcomes` says by prompt what its two responses score."""

    outcomes: Sequence[list[float]]
    max_rounds: int = 4
    drawn: int = 0
    rounds: list[list[int]] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    learnt: list[int] = field(default_factory=list)

    def more_prompts(self, num: int) -> Any:
        prompts = [number % len(self.outcomes) for number in range(self.drawn, self.drawn + num)]
        self.drawn += num
        return prompts

    def generate(self, prompts: Any) -> list[int]:
        self.rounds.append(list(prompts))
        return list(prompts)

    def score(self, batch: list[int]) -> list[int]:
        return batch

    def scores(self, batch: list[int]) -> list[list[float]]:
        return [self.outcomes[prompt] for prompt in batch]

    def choose(self, groups: Sequence[tuple[list[int], Sequence[int]]]) -> list[int]:
        return [batch[number] for batch, numbers in groups for number in numbers]

    def record(self, metrics: Mapping[str, float]) -> None:
        self.metrics |= metrics

    def logprobs(self, batch: list[int]) -> list[int]:
        self.called.append("logprobs")
        return batch

    def values(self, batch: list[int]) -> list[int]:
        raise AssertionError("there is no critic")

    def advantages(self, batch: list[int]) -> list[int]:
        self.called.append("advantages")
        return batch

    def resample(self, batch: list[int]) -> list[int]:
        raise AssertionError("every response is learnt from once")

    def update_critic(self, batch: list[int]) -> None:
        raise AssertionError("there is no critic")

    def update_actor(self, batch: list[int]) -> None:
        self.called.append("update_actor")
        self.learnt = batch

    def sync(self) -> None:
        self.called.append("sync")


def step(outcomes: Sequence[list[float]], wanted: int = 2, max_rounds: int = 4) -> FakeRun:
    run = FakeRun(outcomes, max_rounds)
    dapo.step(run, run.more_prompts(wanted))
    return run


def counts(run: FakeRun) -> tuple[float, ...]:
    return tuple(run.metrics[f"sampling/{name}_groups"] for name in ("kept", "dropped", "filled", "surplus"))


def test_a_batch_of_unequal_groups_is_learnt_from_as_it_is() -> None:
    run = step([MIXED, MIXED])
    assert run.rounds == [[0, 1]] and run.learnt == [0, 1] and counts(run) == (2, 0, 0, 0)
    assert run.called == ["logprobs", "advantages", "update_actor", "sync"]


def test_groups_of_equal_scores_are_replaced_by_other_prompts() -> None:
    run = step([EQUAL, MIXED, EQUAL, MIXED, MIXED])
    assert run.rounds == [[0, 1], [2, 3]]
    assert run.learnt == [1, 3] and counts(run) == (2, 2, 0, 0) and run.metrics["sampling/rounds"] == 2


def test_what_is_found_beyond_the_batch_is_given_up() -> None:
    run = step([EQUAL, MIXED, MIXED, MIXED, MIXED])
    assert run.learnt == [1, 2] and counts(run) == (2, 1, 0, 1)


def test_after_the_last_round_groups_left_out_fill_the_batch() -> None:
    run = step([EQUAL, EQUAL, EQUAL, MIXED, EQUAL, EQUAL], wanted=3, max_rounds=2)
    assert [len(prompts) for prompts in run.rounds] == [3, 3]
    assert run.learnt == [0, 1, 3] and counts(run) == (1, 3, 2, 0)


def test_one_round_changes_neither_the_batch_nor_its_order() -> None:
    run = step([EQUAL, MIXED, EQUAL, MIXED], wanted=4, max_rounds=1)
    assert run.learnt == [0, 1, 2, 3] and run.metrics["sampling/rounds"] == 1


def test_the_mean_score_counts_what_is_left_out() -> None:
    assert step([EQUAL, MIXED, [0.0, 0.0], MIXED]).metrics["sampling/score_mean"] == (2 + 1 + 0 + 1) / 8


def test_refills_ask_for_what_is_missing_at_the_rate_so_far() -> None:
    run = step([MIXED] * 10 + [EQUAL] * 10 + [MIXED] * 20, wanted=20)
    assert len(run.rounds[1]) == 20  # 10 are missing, one group in two is of use, 1.25 times as many
    assert len(step([MIXED] * 18 + [EQUAL] * 2 + [MIXED] * 9, wanted=20).rounds[1]) == 3


@given(st.lists(st.sampled_from([MIXED, EQUAL]), min_size=1), st.integers(1, 12), st.integers(1, 5))
def test_a_step_always_learns_from_a_whole_batch_of_distinct_groups(
    outcomes: list[list[float]], wanted: int, max_rounds: int
) -> None:
    run = step(outcomes, wanted, max_rounds)
    kept, dropped, filled, surplus = counts(run)
    assert len(run.learnt) == wanted == kept + filled
    assert sum(len(prompts) for prompts in run.rounds) == run.drawn == kept + dropped + filled + surplus
    assert len(run.rounds) == run.metrics["sampling/rounds"] <= max_rounds
    assert sum(run.outcomes[prompt] == MIXED for prompt in run.learnt) == kept
    assert not (filled and len(run.rounds) < max_rounds)
