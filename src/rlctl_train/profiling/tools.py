"""Which tool records, why, and the command that a worker runs under where the tool is a program around it."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import write_json
from rlctl_train.config.profile import ProfileConfig, Tool

VENDORS: dict[str, Tool] = {"cuda": "nsys", "rocm": "rocprof", "ascend": "msprof"}
"""By kind of device the tool that is taken where it is installed."""
PROGRAMS: dict[Tool, str] = {"nsys": "nsys", "rocprof": "rocprofv3"}
REPORTS: dict[Tool, str] = {"nsys": ".*nsys-rep", "rocprof": "_*"}
"""Names of what a program writes, after its worker's."""
APART = ("setsid", "--wait")
"""The worker in a session of its own: Ray kills the process group of a worker that has ended, which is when the program
around it writes."""
WRITTEN_WITHIN_S = 120.0
POLL_S = 0.5


@dataclass(frozen=True)
class Choice:
    """The tool of a run."""

    tool: Tool
    why: str


def is_installed(module: str) -> bool:
    """Return whether a module of Python could be imported."""
    return find_spec(module) is not None


def choose(
    config: ProfileConfig,
    device: str,
    which: Callable[[str], str | None] = shutil.which,
    has: Callable[[str], bool] = is_installed,
) -> Choice:
    """Return the tool for a kind of device; `auto` takes the vendor's where the driver finds its program on PATH, or on
    Ascend torch_npu, whose profiler it is."""
    tool = VENDORS.get(device, "torch") if config.tool == "auto" else config.tool
    if tool == "msprof" and not has("torch_npu"):
        if config.tool == "auto":
            return Choice("torch", "torch_npu is not installed, so torch.profiler records")
        raise UserError(
            "profile.tool=msprof records by torch_npu's profiler, and torch_npu is not installed",
            "take profile.tool=auto, which takes what is there",
        )
    if config.tool != "auto":
        return Choice(tool, "profile.tool names it")
    if tool == "torch":
        return Choice(tool, f"torch.profiler is what records on {device}")
    if tool == "msprof":
        return Choice(tool, "torch_npu is there; of workers that share a device it records one at a time, see --roles")
    found = which(PROGRAMS[tool])
    if found is None:
        return Choice("torch", f"{PROGRAMS[tool]} is not on PATH, so torch.profiler records")
    return Choice(tool, f"{found} is there")


def chosen(config: ProfileConfig, role: str, rank: int) -> bool:
    """Return whether the tool records a worker."""
    return (not config.roles or role in config.roles) and (not config.ranks or rank in config.ranks)


def wrapper(config: ProfileConfig, device: str, folder: Path, role: str, rank: int) -> str | None:
    """Return the command in place of Python under which a worker starts; None where no program goes around it.

    Ray runs it through a shell, with the worker's own arguments behind.
    """
    if config.tool not in PROGRAMS or not chosen(config, role, rank):
        return None
    name = f"{role}-{rank}"
    options = _nsys(config, device, folder / name) if config.tool == "nsys" else _rocprof(config, folder, name)
    return shlex.join([PROGRAMS[config.tool], *options, *APART, sys.executable])


def reports(folder: Path, tool: Tool, names: Iterable[str]) -> dict[str, list[Path]]:
    """Return what the programs have written so far, by worker."""
    return {name: sorted(folder.glob(f"{name}{REPORTS[tool]}")) for name in names}


def await_reports(
    folder: Path, tool: Tool, names: Iterable[str], *, num_each: int = 1, limit_s: float = WRITTEN_WITHIN_S
) -> list[str]:
    """Wait until every worker's reports are there and grow no more; return the workers of which one did not come.

    A program writes when its worker ends, or a capture in it does, which takes it a while.
    """
    names, before = list(names), dict[Path, int]()
    deadline = time.monotonic() + limit_s
    while True:
        found = reports(folder, tool, names)
        sizes = {path: path.stat().st_size for paths in found.values() for path in paths}
        missing = [name for name, paths in found.items() if len(paths) < num_each]
        if (not missing and sizes == before) or time.monotonic() > deadline:
            return missing
        before = sizes
        time.sleep(POLL_S)


class Profiling:
    """What a run's profile asks of its workers: the tool, and who runs under it."""

    def __init__(self, config: ProfileConfig, device: str, folder: Path) -> None:
        """`folder` is where reports go, which all nodes see."""
        choice = choose(config, device)
        self.config = config.model_copy(update={"tool": choice.tool})
        self.wrapped: list[str] = []
        """Workers that run under a program, by role and rank."""
        self._device, self._folder = device, folder
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tool.json", asdict(choice))
        print(f"profile: {choice.tool}: {choice.why}", file=sys.stderr)

    def around(self, role: str, rank: int) -> str | None:
        """Return the command under which a worker starts; None where it starts as always."""
        command = wrapper(self.config, self._device, self._folder, role, rank)
        if command is not None:
            self.wrapped.append(f"{role}-{rank}")
        return command

    def await_reports(self) -> None:
        """Wait for what the programs write, and say what did not come."""
        num_each = _num_captures(self.config) if self.config.tool == "nsys" and self._device == "cuda" else 1
        missing = await_reports(self._folder, self.config.tool, self.wrapped, num_each=num_each)
        if missing:
            print(f"warning: {self.config.tool} wrote too few reports of {', '.join(missing)}", file=sys.stderr)


def _nsys(config: ProfileConfig, device: str, output: Path) -> list[str]:
    """On CUDA nothing is recorded before a step asks for it by CUDA's own calls; each step is a report of its own,
    which nsys numbers and writes while the worker goes on: `repeat:N` ends captures, not the worker.

    Elsewhere nobody can ask, and the worker's whole life is recorded. It is the worker's end that is waited for, not
    that of processes that it leaves behind.
    """
    nsys, ended = config.nsys, f"--capture-range-end=repeat:{_num_captures(config)}"
    asked = ["--capture-range=cudaProfilerApi", ended] if device == "cuda" else []
    options = [
        f"--trace={','.join(nsys.trace)}",
        *asked,
        f"--cuda-memory-usage={_word(nsys.cuda_memory_usage)}",
        f"--cuda-graph-trace={nsys.cuda_graph_trace}",
        f"--sample={nsys.sample}",
        f"--python-sampling={_word(nsys.python_sampling)}",
        "--wait=primary",
        "--force-overwrite=true",
        f"--output={output}",
    ]
    if nsys.delay_s is not None:
        options.append(f"--delay={nsys.delay_s:g}")
    return ["profile", *options]


def _num_captures(config: ProfileConfig) -> int:
    return config.last_step - config.first_step + 1


def _rocprof(config: ProfileConfig, folder: Path, name: str) -> list[str]:
    """Each process of the worker's writes files of its own, lest a child's take the place of the worker's."""
    traces = [f"--{trace}-trace" for trace in config.rocprof.trace]
    names = ["--output-directory", str(folder), "--output-file", f"{name}_%pid%"]
    return [*traces, "--output-format", "csv", *names, "--"]


def _word(value: bool) -> str:
    return str(value).lower()
