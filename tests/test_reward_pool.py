"""The pool: whatever a grader does, every other sample keeps its score, in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from rlctl_train.config.errors import UserError
from rlctl_train.config.reward import ArithmeticReward, CustomReward, GraderConfig
from rlctl_train.rewards.pool import GradedSample, GraderPool

GRADER = """
import ctypes, os, re, sys, time
def score(response, ground_truth):
    match response:
        case "exit": os._exit(3)
        case "crash": ctypes.string_at(0)
        case "spin":
            while True: pass
        case "sleep": ctypes.CDLL(None).sleep(1000)
        case "regex": re.match(r"(a+)+$", "a" * 40 + "b")
        case "raise": raise ValueError("no")
        case "nan": return float("nan")
        case "torch": return "torch" in sys.modules
        case "print": print("talk")
    return len(response)
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> CustomReward:
    file = tmp_path_factory.mktemp("grader") / "grader.py"
    file.write_text(GRADER)
    return CustomReward(path=f"{file}:score")


@pytest.fixture(scope="module")
def pool(reward: CustomReward) -> Iterator[GraderPool]:
    with GraderPool(reward, GraderConfig(num_workers=2, time_limit_s=1)) as pool:
        yield pool


def samples(*responses: str) -> list[GradedSample]:
    return [GradedSample(response, "") for response in responses]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("exit", "exit code 3"), ("crash", "killed by SIGSEGV"), ("spin", "longer than grader.time_limit_s=1"),
        ("sleep", "longer than"), ("regex", "longer than"), ("raise", "ValueError: no"), ("nan", "not finite"),
    ],
)  # fmt: skip
def test_a_bad_grader_costs_one_sample(pool: GraderPool, response: str, error: str) -> None:
    grades = pool.score(samples("a", "bb", response, "ccc", "dddd"))
    assert [grade.score for grade in grades] == [1.0, 2.0, 0.0, 3.0, 4.0]
    assert error in (grades[2].error or "")
    assert all(grade.error is None for grade in grades[:2] + grades[3:])


def test_scores_keep_the_order_of_many_samples(pool: GraderPool) -> None:
    responses = ["x" * (i % 17) for i in range(1000)]
    assert [grade.score for grade in pool.score(samples(*responses))] == [len(response) for response in responses]


def test_nothing_to_grade_is_no_work(pool: GraderPool) -> None:
    assert pool.score([]) == []


def test_workers_do_not_load_torch(pool: GraderPool) -> None:
    assert pool.score(samples("torch"))[0].score == 0.0


def test_what_a_grader_prints_stays_off_stdout(pool: GraderPool, capfd: pytest.CaptureFixture[str]) -> None:
    pool.score(samples("print"))
    assert capfd.readouterr().out == ""


def test_a_worker_killed_while_idle_is_replaced(pool: GraderPool) -> None:
    for worker in pool._workers:
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    assert [grade.score for grade in pool.score(samples("a", "bb"))] == [1.0, 2.0]


def test_a_reward_that_does_not_import_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="no such file"):
        GraderPool(CustomReward(path="nowhere.py:score"), GraderConfig())


def test_a_reward_whose_file_kills_the_process_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "dead.py").write_text("import os; os._exit(7)")
    with pytest.raises(UserError, match="exit code 7"):
        GraderPool(CustomReward(path=f"{tmp_path}/dead.py:score"), GraderConfig())


def test_thousands_of_samples_take_seconds() -> None:
    with GraderPool(ArithmeticReward(), GraderConfig()) as pool:
        start = time.perf_counter()
        grades = pool.score([GradedSample(str(i), str(i)) for i in range(4000)])
        assert time.perf_counter() - start < 8.0
    assert sum(grade.score for grade in grades) == 4000


@pytest.mark.parametrize("work", ["import time; time.sleep(1000)", 'import re; re.match(r"(a+)+$", "a" * 40 + "b")'])
def test_a_grader_at_work_does_not_outlive_its_parent(tmp_path: Path, work: str) -> None:
    file = tmp_path / "grader.py"
    file.write_text(f"def score(a, b):\n    print('grading', flush=True)\n    {work}\n")
    code = (
        "from rlctl_train.config.reward import CustomReward, GraderConfig\n"
        "from rlctl_train.rewards.pool import GradedSample, GraderPool\n"
        f"pool = GraderPool(CustomReward(path={str(file)!r} + ':score'), GraderConfig(time_limit_s=0.1))\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "pool._limit_s = 1000.0\n"
        "pool.score([GradedSample('', '')])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        grader = int(parent.stdout.readline())
        assert parent.stderr.readline() == "grading\n"
        parent.kill()
    assert _ends(grader, within_s=60.0)


def _ends(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not _runs(pid):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
