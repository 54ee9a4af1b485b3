"""`rlctl doctor`: examine this machine, and with a preset or file whether that run can start here."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rlctl_hw.host import Host
from rlctl_hw.types import Hardware, Plan

from rlctl import planning, render, rundir, settings
from rlctl.commands import _node_table, _request, _watch
from rlctl.commands._request import FREE, FilesOption, RequestArgument
from rlctl.doctor import registry
from rlctl.doctor.case import Case
from rlctl.doctor.examine import examine
from rlctl.doctor.finding import Finding
from rlctl.farside import cluster as farside_cluster
from rlctl.farside import examination
from rlctl.render import OutputOption
from rlctl.settings import Settings
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import PREFLIGHT, UserError

app = typer.Typer(rich_markup_mode=None)

NODE = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9][A-Za-z0-9.:_-]*")


@app.command(context_settings=FREE)
def doctor(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    only: Annotated[str | None, typer.Option("--only", metavar="NAME,...", help="Run these checks only.")] = None,
    nodes: Annotated[
        str | None, typer.Option("--nodes", metavar="HOST,...", help="Compare names and clocks with these, over ssh.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="As a node of this run, against what it was planned with."),
    ] = None,
    node: Annotated[int, typer.Option("--node", min=0, help="With --run: the node's number.")] = 0,
    compare: Annotated[
        int | None, typer.Option("--compare", min=1, metavar="N", help="With --run: compare the reports of N nodes.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="HOST:PORT", help="With --run: ask the nodes of this Ray cluster."),
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Examine this machine, and with a preset or file whether that run can start. Exit code 4: it cannot.

    Example: rlctl doctor qwen2.5-7b-grpo rollout.type=vllm
    """
    if run is not None:
        if words or files or only or nodes:
            raise UserError(
                f"--run {run} brings its own settings and checks",
                "give --run with --node, --compare or --cluster alone",
            )
        found = rundir.find(settings.load().runs_root(), run)
        if cluster is not None:
            _of_a_cluster(found, cluster, output)
        elif compare is not None:
            _end(found, (examination.compare(found, compare),), f"run {found.name}", output)
        else:
            report = examination.examine_node(found, node)
            _end(found, report.findings, f"node {node} ({report.host})", output)
        return
    checks = registry.chosen(_names(only))
    case = _case(ctx, words, files, _nodes(nodes))
    findings = examine(case, checks)
    counts = Counter(finding.status for finding in findings)
    if not render.document(output, ok=not counts["fail"], counts=counts, findings=[_record(f) for f in findings]):
        _show_findings(findings)
        render.say("\n" + ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "fail", "skip")))
    if counts["fail"]:
        raise typer.Exit(PREFLIGHT)


def _of_a_cluster(run: rundir.Run, address: str, output: render.Output) -> None:
    """Examine the nodes of a Ray cluster as those of a run, and compare them."""
    reports = farside_cluster.examine_cluster(run, address)
    if output == "text":
        _node_table.show(reports)
    whole = examination.compare(run, max(run.plan().num_nodes, len(reports)))
    bad = next((report for report in reports if any(problem.status == "fail" for problem in report.problems)), None)
    if bad is None:
        _end(run, (whole,), f"run {run.name}", output)
    else:
        _end(run, bad.findings, f"node {bad.node} ({bad.host})", output)


def _end(run: rundir.Run, findings: Sequence[Finding], where: str, output: render.Output) -> None:
    """Show what was found of a run's nodes, and stop the run where it cannot go on."""
    failed = [problem for finding in findings for problem in finding.problems if problem.status == "fail"]
    if not render.document(output, ok=not failed, where=where, findings=[_record(f) for f in findings]):
        _show_findings(findings)
    if failed:
        raise examination.stop(run, failed, where)


def before_launch(config: RunConfig, plan: Plan, hardware: Hardware, user: Settings) -> bool:
    """Run the checks that a launch runs first; say what they found, and return whether the run may start."""
    case = Case(_host(user), hardware, config, plan, runs_root=user.runs_root())
    findings = examine(case, registry.at_launch())
    problems = [(finding.name, problem) for finding in findings for problem in finding.problems]
    for name, problem in problems:
        if problem.status == "warn":
            render.note(f"{name}: {problem.what} -> {problem.remedy}")
    failed = [problem for _, problem in problems if problem.status == "fail"]
    for problem in failed:
        render.error(problem.what, problem.remedy)
    return not failed


def _case(ctx: typer.Context, words: Sequence[str] | None, files: FilesOption, nodes: tuple[str, ...]) -> Case:
    hardware = planning.hardware_named(None)
    if not words and not files:
        user = settings.load()
        return Case(_host(user), hardware, runs_root=user.runs_root(), nodes=nodes)
    options, device = _request.options_of(ctx), planning.device_key(hardware)
    request = _request.read(words, files, options=options, name_needed=not files, device=device)
    config, user = request.resolved.config, request.settings
    plan, refusal = None, None
    try:
        planning.check_can_train(config)
        plan = planning.plan_here(config, hardware)
    except UserError as error:
        refusal = error
    return Case(_host(user), hardware, config, plan, refusal, user.runs_root(), nodes)


def _host(user: Settings) -> Host:
    """Return this machine with the environment a run would get."""
    return Host(env=_watch.environment(os.environ, user))


def _show_findings(findings: Sequence[Finding]) -> None:
    render.table(("CHECK", "STATUS", "FOUND"), [row for finding in findings for row in _rows(finding)])


def _rows(finding: Finding) -> list[tuple[str, str, str]]:
    if not finding.problems:
        return [(finding.name, finding.status, finding.what)]
    lines = [(p.status, line) for p in finding.problems for line in (p.what, f"-> {p.remedy}")]
    return [
        (finding.name if i == 0 else "", "" if line.startswith("-> ") else s, line) for i, (s, line) in enumerate(lines)
    ]


def _record(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "remedy": finding.remedy}


def _names(text: str | None) -> list[str]:
    return [part.strip().replace("-", "_") for part in (text or "").split(",") if part.strip()]


def _nodes(text: str | None) -> tuple[str, ...]:
    found = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for node in found:
        if NODE.fullmatch(node) is None:
            raise UserError(f"--nodes: {node!r} is not a host name", "list them like node1,node2 or me@node1")
    return found
