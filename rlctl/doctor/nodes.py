"""Clock and host names, of this machine and between the nodes that `--nodes` names."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn

EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)
"""No machine that runs this release has an earlier date."""
LARGE_OFFSET_S, WRONG_OFFSET_S = 1.0, 60.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
MOST_AT_ONCE = 16


def clock(case: Case) -> Finding:
    """See that the clock shows a date on which this release existed."""
    now = datetime.fromtimestamp(case.tools.now(), UTC)
    problems = []
    if now < EARLIEST:
        what = f"the clock says {now:%Y-%m-%d}: certificates and tokens will be refused"
        problems.append(fail(what, "set the clock, or start its time service"))
    return verdict("clock", problems, f"{now:%Y-%m-%d %H:%M} UTC")


def hostname(case: Case) -> Finding:
    """Resolve this machine's own name, by which Ray's and torch's processes find each other."""
    name = case.tools.hostname()
    found = case.tools.addresses(name)
    return verdict("hostname", _own_name(case, name, found), f"{name} is {', '.join(found)}")


def between(case: Case) -> Finding:
    """Resolve the named nodes, and compare their clocks and names with this machine's over ssh."""
    if not case.nodes:
        return skip("nodes", "no --nodes are named")
    addresses = {node: case.tools.addresses(_host(node)) for node in case.nodes}
    problems = list(_unresolved(addresses))
    known = [node for node, found in addresses.items() if found]
    with ThreadPoolExecutor(max_workers=MOST_AT_ONCE) as pool:
        for answers in pool.map(lambda node: list(_ask(case, node)), known):
            problems += answers
    return verdict("nodes", problems, f"{len(case.nodes)} nodes resolve, and their clocks agree")


def _own_name(case: Case, name: str, found: tuple[str, ...]) -> Iterator[Problem]:
    make = fail if case.num_nodes > 1 else warn
    remedy = f"give {name} its own address in /etc/hosts or in DNS"
    own = {address.split("%")[0] for entries in case.tools.interfaces().values() for address in entries}
    if not found:
        yield make(f"this host's name {name} does not resolve", remedy)
    elif all(_is_loopback(address) for address in found):
        if case.num_nodes > 1:
            yield fail(
                f"this host's name {name} resolves to {', '.join(found)} only, which other nodes cannot use", remedy
            )
    elif not any(address.split("%")[0] in own for address in found):
        yield make(f"this host's name {name} resolves to {', '.join(found)}, which is no address of this host", remedy)


def _unresolved(addresses: dict[str, tuple[str, ...]]) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for node, found in addresses.items():
        if not found:
            yield fail(f"{node} does not resolve", f"add {_host(node)} to DNS or /etc/hosts, or correct --nodes")
        elif len(addresses) > 1 and all(_is_loopback(address) for address in found):
            yield fail(f"{node} resolves to {', '.join(found)}, which is each node itself", "give its outer address")
        elif found[0] in owners:
            yield fail(f"{node} and {owners[found[0]]} are the same address {found[0]}", "correct --nodes or DNS")
        else:
            owners[found[0]] = node


def _ask(case: Case, node: str) -> Iterator[Problem]:
    """Ask one node for its time and for the address it has of this machine."""
    before = case.tools.now()
    me = case.tools.hostname()
    answer = case.host.run([*SSH, node, f"date +%s.%N && (getent hosts {me} || echo unresolved)"])
    after = case.tools.now()
    if answer.code != 0:
        remedy = f"set up a key so that `ssh {node} true` works without a question, if it should"
        yield warn(f"{node} cannot be asked for its clock: {answer.error}", remedy)
        return
    time_line, _, name_line = answer.stdout.strip().partition("\n")
    offset = _offset_s(time_line, before, after)
    if offset is None:
        yield warn(f"{node} does not tell its time", f"look what `ssh {node} date +%s.%N` prints")
    elif offset > LARGE_OFFSET_S:
        make = fail if offset > WRONG_OFFSET_S else warn
        yield make(f"the clock of {node} is {offset:.0f} s apart from this one", "start a time service on all nodes")
    if name_line.strip() == "unresolved":
        yield fail(f"{node} cannot resolve {me}", f"add {me} to DNS or to /etc/hosts of {node}")


def _offset_s(text: str, before: float, after: float) -> float | None:
    """Return how far a clock is from the time between question and answer, in seconds; 0 when within it."""
    try:
        theirs = float(text)
    except ValueError:
        return None
    return max(before - theirs, theirs - after, 0.0)


def _host(node: str) -> str:
    return node.rpartition("@")[2]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return False
