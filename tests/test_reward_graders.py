"""Each reward by value: what counts as right, what as well-formed, what cannot be graded at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlctl_train.config.errors import UserError
from rlctl_train.config.reward import ArithmeticReward, CustomReward, Gsm8kReward, MathReward, RewardConfig, SumReward
from rlctl_train.rewards.base import Grade, GradedSample, make_grader
from rlctl_train.rewards.boxed import last_boxed


def graded(config: RewardConfig, response: str, truth: object, **extra: object) -> Grade:
    return make_grader(config)(GradedSample(response, truth, "source", extra))


def score(config: RewardConfig, response: str, truth: object) -> float:
    return graded(config, response, truth).score


@pytest.mark.parametrize("response", ["68", " 68\n"])
@pytest.mark.parametrize("truth", ["68", 68, 68.0])
def test_arithmetic_takes_the_number_alone(response: str, truth: object) -> None:
    assert score(ArithmeticReward(), response, truth) == 1.0


@pytest.mark.parametrize("response", ["", "068", "68.", "68 68", "= 68", "+68", "-0", "٦٨"])
def test_arithmetic_wants_the_one_usual_form(response: str) -> None:
    assert score(ArithmeticReward(format_score=0.5), response, "68") == 0.0


def test_arithmetic_gives_the_format_score_to_a_wrong_number() -> None:
    grade = graded(ArithmeticReward(format_score=0.25), "67", "68")
    assert (grade.score, grade.accuracy, grade.reason) == (0.25, 0.0, "67 is not 68")


def test_arithmetic_compares_numbers_of_any_length() -> None:
    assert score(ArithmeticReward(), "9" * 5000, "9" * 5000) == 1.0


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("#### 72", "72"), ("####72", 72), ("so\n#### 1,234", "1234"), ("#### 1234.", "1,234"), ("#### $5", "5"),
        ("#### -3 apples", "-3"), ("#### 6 #### 5", "5"), ("#### 72.00", "It is\n#### 72"), ("#### .5", "0.5"),
    ],
)  # fmt: skip
def test_gsm8k_strict_reads_the_number_after_the_mark(response: str, truth: object) -> None:
    assert score(Gsm8kReward(), response, truth) == 1.0


@pytest.mark.parametrize("response", ["72", "#### seventy", "#### 71", "#### 72" + "x" * 300, "#### 72 #### 7"])
def test_gsm8k_strict_refuses(response: str) -> None:
    assert score(Gsm8kReward(), response, "72") == 0.0


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("it is 1,234", "1234"), ("it is 1234", "1,234"), ("the answer is $5.", "5"), ("10-4", "4"), ("it is -4", "-4"),
        ("it is −4.", "-4"), ("first 1. then 2", "2"), ("2,024.", "2024"), ("50%", "50"),
    ],
)  # fmt: skip
def test_gsm8k_flexible_reads_the_last_number(response: str, truth: str) -> None:
    assert score(Gsm8kReward(method="flexible"), response, truth) == 1.0


def test_gsm8k_looks_at_the_last_300_characters_and_never_at_half_a_number() -> None:
    flexible = Gsm8kReward(method="flexible")
    assert score(flexible, "45" + "x" * 298, "45") == 1.0
    assert score(flexible, "12345" + "x" * 298, "45") == 0.0


def test_gsm8k_says_that_a_ground_truth_is_no_number() -> None:
    grade = graded(Gsm8kReward(), "#### 5", "five")
    assert grade.score == 0.0
    assert grade.error == "the ground truth 'five' is not a number"


@given(st.text(), st.integers())
def test_gsm8k_grades_any_text(response: str, truth: int) -> None:
    for method in ("strict", "flexible"):
        grade = graded(Gsm8kReward(method=method), response, truth)
        assert grade.error is None


@given(st.integers(), st.text(alphabet="ab .\n", max_size=50))
def test_gsm8k_finds_the_number_it_is_given(number: int, before: str) -> None:
    assert score(Gsm8kReward(), f"{before}#### {number:,}", str(number)) == 1.0
    assert score(Gsm8kReward(), f"{before}#### {number:,}", str(number + 1)) == 0.0


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"), (r"\boxed{\frac{1}{2}} no", r"\frac{1}{2}"), (r"\boxed{1} and \fbox{2}", "2"),
        (r"\boxed 7", "7"), (r"\boxed{a\}b}", r"a\}b"), (r"\boxed{1} \boxed{2", "1"), ("none", None),
        (r"\boxed{", None),
    ],
)  # fmt: skip
def test_the_last_complete_box_counts(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0), (r"\boxed{5000}", "5,000", 1.0),
        (r"\boxed{2\sqrt2}", r"$\sqrt{8}$", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0), (r"\boxed{3}", "2", 0.0), ("2", "2", 0.0),
    ],
)  # fmt: skip
def test_math_judges_equivalence_of_the_box(response: str, truth: str, expected: float) -> None:
    pytest.importorskip("math_verify")
    assert score(MathReward(), response, truth) == expected


def test_math_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError) as caught:
        make_grader(MathReward())
    assert caught.value.remedy == "pip install 'rlctl[math]'"


def custom(folder: Path, code: str, **kwargs: object) -> CustomReward:
    file = folder / "mine.py"
    file.write_text(code)
    return CustomReward(path=f"{file}:score", kwargs=kwargs)


@pytest.mark.parametrize(
    "signature",
    [
        "response, ground_truth", "text, truth", "response, **rest", "*both", "a, b, /", "response, truth, level",
        "data_source, solution_str, ground_truth, extra_info=None", "**everything", "response", "text, ground_truth=0",
    ],
)  # fmt: skip
def test_a_users_function_gets_what_it_names(tmp_path: Path, signature: str) -> None:
    code = f"def score({signature}):\n    values = list(map(str, locals().values()))\n    return 'hello' in str(values)"
    assert graded(custom(tmp_path, code), "hello", "hi", level=3).score == 1.0


def test_a_users_function_gets_response_and_ground_truth_in_order(tmp_path: Path) -> None:
    code = "def score(text, truth, tolerance=2):\n    return {'score': tolerance, 'same': text + truth == 'ab'}"
    grade = graded(custom(tmp_path, code, tolerance=3), "a", "b", unused=1)
    assert (grade.score, grade.parts) == (3.0, {"same": 1.0})


def test_a_dict_may_say_why_and_whether_it_is_right(tmp_path: Path) -> None:
    grade = graded(custom(tmp_path, "def score(a, b): return {'score': -1, 'acc': True, 'reason': 'short'}"), "", "")
    assert (grade.score, grade.accuracy, grade.reason) == (-1.0, 1.0, "short")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return None", "TypeError: the function gave NoneType, not a number"),
        ("return {'points': 1}", "TypeError: the returned dict has no 'score', only 'points'"),
        ("return float('inf')", "score is not finite: inf"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_fails_is_a_recorded_zero(tmp_path: Path, body: str, error: str) -> None:
    grade = graded(custom(tmp_path, f"def score(a, b): {body}"), "x", "y")
    assert (grade.score, grade.error) == (0.0, error)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import nothing_of_this_name", "does not import"), ("def other(a, b): ...", "has no 'score'"),
        ("score = 3", "is no function"), ("async def score(a, b): ...", "is async"),
        ("def score(): ...", "no response"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_work_is_refused_at_once(tmp_path: Path, code: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        make_grader(custom(tmp_path, code))


def test_a_kwarg_nobody_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes no argument strictness"):
        make_grader(custom(tmp_path, "def score(a, b): return 1", strictness=2))


def test_a_sum_weighs_its_parts_and_records_each(tmp_path: Path) -> None:
    short = custom(tmp_path, "def score(response, ground_truth): return -len(response)").model_copy(
        update={"weight": 0.1}
    )
    grade = graded(SumReward(parts=(Gsm8kReward(weight=2.0), short)), "#### 5", "5")
    assert grade.score == pytest.approx(2.0 - 0.6)
    assert (grade.parts, grade.accuracy) == ({"gsm8k": 1.0, "score": -6.0}, 1.0)


def test_a_part_that_fails_adds_nothing_and_is_named(tmp_path: Path) -> None:
    broken = custom(tmp_path, "def score(a, b): raise ValueError('no')")
    grade = graded(SumReward(parts=(broken, ArithmeticReward())), "5", "5")
    assert (grade.score, grade.error) == (1.0, "score: ValueError: no")


def test_the_weight_of_a_single_reward_counts() -> None:
    grade = graded(ArithmeticReward(weight=3.0), "5", "5")
    assert (grade.score, grade.accuracy) == (3.0, 1.0)
