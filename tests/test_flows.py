"""Flows read like the paper: each step calls the verbs in order, and nothing else."""

from typing import Any

from rlctl_train.flows import distill, on_policy, remax, spin, supervised


class Recorder:
    """A run that writes down which verbs were called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, verb: str) -> Any:
        def call(*_: Any) -> str:
            self.called.append(verb)
            return "batch"

        return call


def test_the_on_policy_step_generates_judges_learns_and_syncs() -> None:
    run = Recorder()
    on_policy.step(run, [])
    assert run.called == [
        "generate", "score", "logprobs", "values", "advantages", "resample", "update_critic", "update_actor", "sync",
    ]  # fmt: skip


def test_the_step_of_remax_compares_with_a_greedy_response() -> None:
    run = Recorder()
    remax.step(run, [])
    assert run.called == [
        "generate", "score", "greedy_baseline", "logprobs", "advantages", "update_actor", "sync",
    ]  # fmt: skip


def test_the_step_of_distillation_asks_the_teacher_before_it_learns() -> None:
    run = Recorder()
    distill.step(run, [])
    assert run.called == [
        "generate", "score", "logprobs", "teach", "advantages", "update_actor", "sync",
    ]  # fmt: skip


def test_the_step_of_spin_ends_by_looking_after_its_reference() -> None:
    run = Recorder()
    spin.step(run, [])
    assert run.called == [
        "generate", "score", "logprobs", "advantages", "update_actor", "sync", "refresh_reference",
    ]  # fmt: skip


def test_the_supervised_step_reads_and_learns() -> None:
    run = Recorder()
    supervised.step(run, [])
    assert run.called == ["read", "update_supervised"]
