"""The doctor as a whole: time limits, secrets, garbage, the command, the start of a launch."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as over
from hypothesis import strategies as st
from rlctl_hw.host import CommandResult

from rlctl import app, redact
from rlctl.commands import doctor as command
from rlctl.doctor import registry
from rlctl.doctor.case import Case
from rlctl.doctor.examine import examine
from rlctl.doctor.finding import Finding, fail, verdict, warn
from rlctl.doctor.registry import CHECKS, Check
from rlctl.settings import Settings
from rlctl_train.config.errors import UserError
from tests import doctor_support as given

Cli = Callable[..., tuple[int, str, str]]
SECRET = "hf_verysecretvalue"


class Stub(Check):
    """A check whose function is in the test."""

    def load(self) -> Callable[[Case], Finding]:
        return FUNCTIONS[self.target]


def hang(case: Case) -> Finding:
    threading.Event().wait(30)
    raise AssertionError("not reached in a test")


def stumble(case: Case) -> Finding:
    raise KeyError(f"bad fact {SECRET}")


def tell(case: Case) -> Finding:
    problems = [warn(f"a\n  url https://me:pw@host {SECRET}", "b"), fail("c", f"use {SECRET}")]
    return verdict("tell", problems, "")


def fine(case: Case) -> Finding:
    return verdict("fine", (), "all well")


FUNCTIONS = {"hang": hang, "stumble": stumble, "tell": tell, "fine": fine}


def stub(name: str, **changes: Any) -> Check:
    return Stub(name, name, "x", "x", "x", **changes)


@pytest.mark.parametrize("status", ["warn", "fail"])
def test_a_check_that_hangs_is_told_with_its_limit_and_stops_no_other(status: Any) -> None:
    found = examine(given.case(), [stub("hang", limit_s=0.05, on_timeout=status), stub("fine")])
    assert [f.status for f in found] == [status, "ok"]
    assert "limit of 0.05 s" in found[0].what and found[0].remedy


def test_a_check_that_stumbles_warns_and_stops_no_other() -> None:
    found = examine(given.case(env={"HF_TOKEN": SECRET}), [stub("stumble"), stub("fine")])
    assert [f.status for f in found] == ["warn", "ok"]
    assert "KeyError" in found[0].what and SECRET not in found[0].what


def test_secrets_are_never_in_what_a_check_answers() -> None:
    (found,) = examine(given.case(env={"MY_API_KEY": SECRET}), [stub("tell")])
    text = json.dumps(command._record(found))
    assert SECRET not in text and "pw" not in text and "\\n" not in text
    assert found.status == "fail" and "(removed)" in text and "https://(removed)@host" in text


def test_short_values_are_words_and_stay() -> None:
    assert redact.message("RAY_AUTH_MODE=token", {"RAY_AUTH_MODE": "token"}) == "RAY_AUTH_MODE=token"


def test_a_verdict_puts_what_fails_first_and_names_each_way_out_once() -> None:
    found = verdict("x", [warn("a", "do"), fail("b", "do")], "fine")
    assert (found.status, found.what, found.remedy) == ("fail", "b; a", "do")


NAMES = st.sampled_from(
    [
        "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES",
        "ASCEND_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA",
        "GLOO_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "RAY_AUTH_MODE", "RAY_TMPDIR",
        "WANDB_BASE_URL", "HOME", "CUDA_DEVICE_ORDER",
    ]
)  # fmt: skip
VALUES = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
MACHINES = st.sampled_from(["cpu:2", "h100:2", "mi300x:8", "ascend-910b2:2"])


@over(env=st.dictionaries(NAMES, VALUES | st.sampled_from(["0,1", "^=", ",", "-1", "expandable_segments:True"])),
      spec=MACHINES, output=VALUES)  # fmt: skip
def test_a_garbage_environment_never_makes_a_check_stumble(env: dict[str, str], spec: str, output: str) -> None:
    config = given.config(
        model={"type": "pretrained", "path": "Qwen/Qwen2.5-0.5B"}, rollout={"type": "vllm"},
        telemetry={"trackers": ("wandb", "mlflow")}, ray={"address": "head:6379"},
    )  # fmt: skip
    hardware = given.machine(spec)
    case = given.case(
        hardware, env=env, config=config, plan=given.plan(hardware.kind), nodes=("a", "b"),
        run=given.answers(ssh=CommandResult(output, 0)), tools=given.tools(version=lambda name: output),
    )  # fmt: skip
    for check in CHECKS:
        assert check.load()(case).status in ("ok", "warn", "fail", "skip")


def test_every_check_answers_under_its_own_name_and_says_a_remedy_for_what_is_wrong() -> None:
    broken = given.tools(
        folder=lambda name: None, free=lambda path: 0, open_files=lambda: (64, 64), listen=lambda host: "no",
        addresses=lambda host: (), now=lambda: 0.0,
    )  # fmt: skip
    for case in (given.case(), given.case(config=given.config(), plan=given.plan()), given.case(tools=broken)):
        for check in CHECKS:
            found = check.load()(case)
            assert found.name == check.name
            assert all(p.what and p.remedy for p in found.problems)
            assert found.what


def test_names_of_checks_are_unique_and_unknown_ones_refused() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert [check.name for check in registry.chosen(["disk", "shm"])] == ["shm", "disk"]
    assert registry.chosen([]) == CHECKS
    with pytest.raises(UserError) as raised:
        registry.chosen(["dsk"])
    assert raised.value.remedy == "did you mean disk?"


def test_a_plan_that_does_not_fit_is_a_finding() -> None:
    case = given.case(config=given.config(), refusal=UserError("too large", "take a smaller one"))
    (found,) = examine(case, registry.chosen(["plan"]))
    assert (found.status, found.what, found.remedy) == ("fail", "too large", "take a smaller one")


def test_heavy_imports_are_left_to_the_command_unless_the_run_needs_them() -> None:
    ran: list[str] = []

    def python(code: str, arguments: Any, limit_s: float) -> CommandResult:
        ran.append(code)
        return CommandResult("", 0)

    case = given.case(config=given.config(), plan=given.plan(), tools=given.tools(python=python))
    examine(case, registry.at_launch())
    assert ran == []
    examine(replace(case, config=given.config(rollout={"type": "vllm"})), registry.at_launch())
    assert len(ran) == 1 and "import vllm" in ran[0]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(["doctor", *words])
        done = capfd.readouterr()
        return code, done.out, done.err

    return call


def test_the_command_shows_a_table_and_counts(cli: Cli) -> None:
    code, out, err = cli("--only", "clock,model,open-files")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["CHECK", "STATUS"], ["open_files", "ok"], ["model", "skip"], ["clock", "ok"],
    ]  # fmt: skip
    assert err.strip() == "2 ok, 0 warn, 0 fail, 1 skip"


def test_a_failure_gives_exit_code_4_and_its_remedy_on_the_next_line(cli: Cli) -> None:
    code, out, _ = cli("quickstart", "data.type=parquet", "data.train=no.parquet", "--only", "data")
    assert code == 4
    assert out.splitlines()[1].split()[:2] == ["data", "fail"]
    assert out.splitlines()[2].strip().startswith("-> make it with `rlctl data prep`")


def test_json_has_a_schema_version_and_every_finding(cli: Cli) -> None:
    code, out, _ = cli("quickstart", "ray.address=localhost:1", "-o", "json", "--only", "ports,plan,shm")
    found = json.loads(out)
    assert (code, found["schema_version"], found["ok"]) == (4, 1, False)
    assert [f["name"] for f in found["findings"]] == ["plan", "shm", "ports"]
    ports = found["findings"][2]
    assert ports["status"] == "fail" and ports["remedy"] == ports["problems"][0]["remedy"]
    assert found["counts"]["fail"] == 1


def test_a_run_that_does_not_fit_is_code_4_here(cli: Cli) -> None:
    large = ("model.hidden_size=65536", "model.num_layers=90")
    code, out, _ = cli("quickstart", *large, "--only", "plan,host_memory")
    assert code == 4
    assert [line.split()[:2] for line in out.splitlines() if not line.startswith(" ")][1:] == [
        ["plan", "fail"], ["host_memory", "skip"],
    ]  # fmt: skip


@pytest.mark.parametrize("nodes", ["-oProxyCommand=x", "a b", "a;b", "$(x)"])
def test_what_is_no_host_name_never_reaches_ssh(nodes: str, cli: Cli) -> None:
    code, _, err = cli("--nodes", nodes)
    assert code == 2 and "is not a host name" in err


def test_a_secret_of_the_environment_is_not_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{SECRET}")
    for form in ("text", "json"):
        _, out, err = cli("quickstart", "--only", "disk,tokens,model,versions", "-o", form)
        assert SECRET not in out + err


def started(monkeypatch: pytest.MonkeyPatch, *names: str) -> bool:
    monkeypatch.setattr(registry, "at_launch", lambda: tuple(stub(name) for name in names))
    return command.before_launch(given.config(), given.plan(), given.machine(), Settings())


def test_a_launch_says_warnings_and_stops_at_failures(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert started(monkeypatch, "fine", "stumble")
    said = capfd.readouterr().err
    assert said.startswith("note: stumble: could not be examined") and " -> report this" in said
    assert not started(monkeypatch, "tell", "fine")
    said = capfd.readouterr().err
    assert said.splitlines()[-2] == "error: c" and said.splitlines()[-1].startswith("  -> use ")
