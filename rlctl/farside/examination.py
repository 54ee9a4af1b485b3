"""The doctor on the nodes of a run: each against what was planned, and their reports compared."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlctl_hw.host import Host
from rlctl_hw.types import Plan

from rlctl import planning, rundir
from rlctl.doctor import registry
from rlctl.doctor.case import GIB, Case
from rlctl.doctor.disk import existing
from rlctl.doctor.examine import examine
from rlctl.doctor.finding import Finding, Problem, fail, verdict, warn
from rlctl.doctor.promised import device_words, least_memory_gib
from rlctl.farside import promise
from rlctl.farside.package_set import PROMISED
from rlctl.farside.report import Report, reports
from rlctl.rundir import Run
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import write_json

ALIKE: tuple[tuple[str, Callable[[Report], Any], Callable[[str, str], Problem]], ...] = (
    ("devices", lambda report: report.devices, fail),
    ("versions", lambda report: report.packages, fail),
    # Ray refuses another minor version of Python, and lets another patch pass.
    ("Python", lambda report: report.python.rpartition(".")[0], fail),
    ("the driver", lambda report: report.driver, warn),
)
"""What should be the same on all nodes, and how bad it is when it is not."""


def told(run: Run) -> dict[str, Any]:
    """Return what a node must know of a run, as plain values."""
    given = promise.read(run.files.environment)
    return {
        "root": str(run.files.root),
        "config": run.config(),
        "plan": run.plan().to_json(),
        "promise": None if given is None else given.to_json(),
    }


def case_from(data: dict[str, Any]) -> Case:
    """Return this machine as a node of the run that `told` describes."""
    return Case(
        Host(env=os.environ),
        planning.hardware_named(None),
        RunConfig.model_validate(data["config"]),
        Plan.from_json(data["plan"]),
        runs_root=Path(data["root"]),
        promise=None if data["promise"] is None else promise.from_json(data["promise"]),
    )


def case_of(run: Run) -> Case:
    """Return this machine as a node of a run: its stored configuration, plan and promise."""
    return case_from(told(run))


def report_of(case: Case, node: int) -> Report:
    """Run the checks of a node: first those against the plan, and the others where the devices are as planned."""
    planned = None if case.promise is None else case.promise.machine
    versions = {name: case.tools.version(name) for name in PROMISED}
    return Report(
        node=node,
        host=socket.gethostname(),
        when=time.time(),
        planned="any machine" if planned is None else planned.words,
        devices=device_words(case.hardware),
        memory_gib=round(least_memory_gib(case.hardware), 1),
        driver=case.fact(f"{case.hardware.kind}.driver"),
        python=platform.python_version(),
        packages={name: version for name, version in versions.items() if version is not None},
        free_gib=round(case.tools.free(existing(case.runs_root)) / GIB, 1),
        findings=tuple(_findings(case)),
    )


def keep(run: Run, report: Report) -> Report:
    """Write a node's report into the run folder."""
    run.files.doctor.mkdir(exist_ok=True)
    write_json(run.files.doctor / f"node-{report.node}.json", report.to_json())
    return report


def examine_node(run: Run, node: int) -> Report:
    """Run the checks of this node and keep the report."""
    return keep(run, report_of(case_of(run), node))


def compare(run: Run, num_nodes: int) -> Finding:
    """Compare the reports of nodes 0 to `num_nodes` - 1: all there, and alike in what a run relies on."""
    found = [report for report in reports(run) if report.node < num_nodes]
    words = f"{num_nodes} nodes alike: {found[0].machine}" if found else ""
    return verdict("nodes_alike", [*_absent(found, num_nodes), *_unlike(found)], words)


def stop(run: Run, problems: Sequence[Problem], where: str) -> UserError:
    """Write into the run's status why it does not start, and return that as the error of this process."""
    failed = [problem for problem in problems if problem.status == "fail"]
    what = f"{where}: {'; '.join(problem.what for problem in failed)}"
    error = UserError(what, "; ".join(dict.fromkeys(problem.remedy for problem in failed)), exit_code=PREFLIGHT)
    rundir.give_up(run, error)
    return error


def _findings(case: Case) -> list[Finding]:
    first = [check for check in registry.on_nodes() if check.name.startswith("planned")]
    found = examine(case, first)
    if any(finding.name == "planned_devices" and finding.status == "fail" for finding in found):
        # On another machine than the plan's, whatever else is found follows from that.
        return found
    return [*found, *examine(case, [check for check in registry.on_nodes() if check not in first])]


def _absent(found: Sequence[Report], num_nodes: int) -> Iterator[Problem]:
    absent = sorted(set(range(num_nodes)).difference(report.node for report in found))
    if absent:
        names = ", ".join(str(node) for node in absent)
        what = f"planned for {num_nodes} nodes; no report of node {names}"
        yield fail(what, "look in the job's log for why it could not be examined")


def _unlike(found: Sequence[Report]) -> Iterator[Problem]:
    for name, of, make in ALIKE:
        nodes: dict[str, list[str]] = {}
        for report in found:
            nodes.setdefault(_words(of(report)), []).append(f"{report.node} ({report.host})")
        if len(nodes) > 1:
            listing = "; ".join(f"node {', '.join(those)}: {value}" for value, those in nodes.items())
            yield make(f"the nodes differ in {name}: {listing}", "ask for nodes of one kind, with one environment")


def _words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
