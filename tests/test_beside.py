"""What is done beside the work ends with it, and its failure is not the work's."""

from __future__ import annotations

import threading

import pytest

from rlctl_train.beside import repeated


def test_it_is_done_again_and_again_while_the_body_runs_and_no_longer() -> None:
    times, often = list[int](), threading.Event()

    def act() -> None:
        times.append(1)
        if len(times) == 3:
            often.set()

    with repeated("counting", act, 0.001, patience_s=10):
        assert often.wait(10)
    done = len(times)
    assert "counting" not in {thread.name for thread in threading.enumerate()} and len(times) == done


def test_the_bodys_own_error_comes_through_and_ends_it() -> None:
    with pytest.raises(ValueError, match="broken"), repeated("counting", lambda: None, 0.001, patience_s=10):
        raise ValueError("broken")
    assert "counting" not in {thread.name for thread in threading.enumerate()}
