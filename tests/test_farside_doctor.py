"""The doctor on a run's nodes: planned against found, one report a node, nodes compared, and what `runs show` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.types import Device

import rlctl
from rlctl import app
from rlctl.doctor import promised, registry
from rlctl.doctor.case import Case
from rlctl.farside import examination
from rlctl.farside.promise import Machine, Promise, machine_of
from rlctl.farside.report import reports
from rlctl.rundir import Run
from rlctl_train.config.errors import PREFLIGHT
from tests import doctor_support as given
from tests.farside_support import create, order

Cli = Callable[..., tuple[int, str, str]]
H100 = Machine("cuda", 8, 79.1, "h100-80gb")


def node(spec: str, planned: Machine | None = H100, **changes: Any) -> Case:
    """Return a machine as a node of a run that was planned for another, or for the same."""
    promise = Promise("wheel", planned, 2, changes.pop("versions", {}))
    return given.case(given.machine(spec), plan=given.plan("cuda"), promise=promise, **changes)


@pytest.mark.parametrize(
    ("spec", "status"),
    [("h100-80gb:8", "ok"), ("cpu:8", "fail"), ("mi300x:8", "fail"), ("h100-80gb:4", "fail"), ("a100-40gb:8", "fail")],
)
def test_devices_are_held_against_kind_number_and_memory(spec: str, status: str) -> None:
    found = promised.devices(node(spec))
    assert found.status == status and "planned for 8 x h100-80gb of 79.1 GiB a node; found" in found.what


def test_another_model_with_as_much_memory_is_only_told() -> None:
    assert promised.devices(node("h200-141gb:8")).status == "warn"


def test_fewer_cores_are_only_told() -> None:
    assert promised.devices(node("cpu:2", Machine("cpu", 4, 16.0))).status == "warn"
    assert promised.devices(node("cpu:4", Machine("cpu", 4, 16.0))).status == "ok"


def test_bfloat16_is_asked_of_devices_that_have_it() -> None:
    bf16 = given.plan("cuda", compute_dtype="bfloat16")
    t4, h100 = node("t4-16gb:8"), node("h100-80gb:8")
    found = promised.precision(replace(t4, plan=bf16))
    assert found.status == "fail" and found.remedy == "set trainer.compute_dtype=float32"
    assert promised.precision(replace(h100, plan=bf16)).status == promised.precision(t4).status == "ok"


def test_versions_are_those_of_the_launch_whatever_their_build() -> None:
    here = given.tools(version={"torch": "2.13.0+cu130", "ray": "2.59.0"}.get)
    versions = {"rlctl": rlctl.__version__, "torch": "2.13.0"}
    assert promised.versions(node("cpu:1", tools=here, versions=versions)).status == "ok"
    found = promised.versions(node("cpu:1", tools=here, versions={"ray": "2.60.0", "vllm": "0.32.0", "rlctl": "9.9"}))
    assert {problem.what for problem in found.problems} == {
        "planned with ray 2.60.0; found 2.59.0",
        "planned with vllm 0.32.0; it is not installed here",
        f"planned with rlctl 9.9; found {rlctl.__version__}",
    }


def test_a_machine_of_which_nothing_was_promised_is_not_compared() -> None:
    for check in (promised.devices, promised.precision, promised.versions):
        assert check(given.case()).status == "skip"


def test_nodes_run_the_checks_of_a_launch_and_those_against_the_plan() -> None:
    names = {check.name for check in registry.on_nodes()}
    assert {"planned_devices", "planned_precision", "planned_versions", "torch", "disk"} <= names
    assert "hostname" not in names and "planned_devices" not in {check.name for check in registry.at_launch()}


def test_a_cpu_is_promised_by_its_cores_and_this_machine_not_at_all() -> None:
    assert machine_of(order().config.launch) == Machine("cpu", 1, 8.0)
    assert machine_of(order(launch={"type": "local"}).config.launch) is None


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create(order(root=tmp_path / "runs" / "first"))


def examine_as(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Let the doctor look at a machine that is made up, with the checks against the plan alone."""
    monkeypatch.setattr(examination, "case_of", lambda run: case)
    checks = tuple(check for check in registry.on_nodes() if check.name.startswith("planned"))
    monkeypatch.setattr(registry, "on_nodes", lambda: checks)


def test_a_mismatch_ends_the_command_and_the_run_with_both_sides_named(
    cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine_as(monkeypatch, node("cpu:8"))
    code, _, told = cli("doctor", "--run", "first", "--node", "1")
    assert code == PREFLIGHT and "node 1" in told and "planned for 8 x h100-80gb" in told and "found CPU" in told
    status = run.status()
    assert (status.state, status.exit_code) == ("failed", PREFLIGHT)
    assert status.error is not None and "launch.machine" in status.error["remedy"]


def test_on_another_machine_than_the_plans_nothing_else_is_examined() -> None:
    names = [finding.name for finding in examination.report_of(node("cpu:8"), 0).findings]
    assert names == ["planned_devices", "planned_precision", "planned_versions"]
    assert "disk" in [finding.name for finding in examination.report_of(node("h100-80gb:8"), 0).findings]


def test_the_report_of_every_node_is_shown_with_the_run(cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_as(monkeypatch, node("h200-141gb:8"))
    for index in ("0", "1"):
        assert cli("doctor", "--run", "first", "--node", index)[0] == 0
    _, shown, _ = cli("runs", "show", "first")
    assert shown.count("8 x h200-141gb") >= 2 and "1 warn" in shown and run.status().state == "pending"
    data = json.loads(cli("runs", "show", "first", "-o", "json")[1])
    assert [(report["node"], report["counts"]["warn"]) for report in data["doctor"]] == [(0, 1), (1, 1)]
    assert reports(run)[1].problems[0].status == "warn"


def test_nodes_that_are_alike_pass_the_comparison(cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_as(monkeypatch, node("h100-80gb:8"))
    for index in (0, 1):
        examination.examine_node(run, index)
    assert cli("doctor", "--run", "first", "--compare", "2")[0] == 0


def test_a_node_without_report_stops_the_run(cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_as(monkeypatch, node("h100-80gb:8"))
    examination.examine_node(run, 1)
    code, _, told = cli("doctor", "--run", "first", "--compare", "3")
    assert code == PREFLIGHT and "no report of node 0, 2" in told


def test_nodes_that_differ_are_named_with_what_each_has(cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, version in enumerate(("2.13.0+cu130", "2.13.0+cu130", "2.13.0+cu129")):
        examine_as(monkeypatch, node("h100-80gb:8", tools=given.tools(version={"torch": version}.get)))
        examination.examine_node(run, index)
        monkeypatch.undo()
    problems = examination.compare(run, 3).problems
    assert [problem.status for problem in problems] == ["fail"]
    assert "node 0 " in problems[0].what and "node 2 " in problems[0].what and "torch 2.13.0+cu129" in problems[0].what


def test_another_patch_of_python_and_another_driver_let_the_run_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, driver in enumerate(("580.1", "580.2")):
        case = node("h100-80gb:8")
        examine_as(monkeypatch, replace(case, hardware=given.machine("h100-80gb:8", {"cuda.driver": driver})))
        monkeypatch.setattr(examination.platform, "python_version", lambda index=index: f"3.11.{index}")
        examination.examine_node(run, index)
        monkeypatch.undo()
    assert [problem.status for problem in examination.compare(run, 2).problems] == ["warn"]


def test_a_run_brings_its_own_settings(cli: Cli, run: Run) -> None:
    code, _, told = cli("doctor", "quickstart", "--run", "first")
    assert code == 2 and "--run first" in told


def test_the_smallest_device_is_the_one_that_counts() -> None:
    case = node("h100-80gb:8")
    small = replace(case.hardware.devices[0], memory_gib=40.0)
    assert isinstance(small, Device)
    mixed = replace(case.hardware, devices=(small, *case.hardware.devices[1:]))
    assert promised.devices(replace(case, hardware=mixed)).status == "fail"
