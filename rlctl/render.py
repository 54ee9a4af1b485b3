"""The only place that prints: data on stdout, talk on stderr, colour only where a terminal wants it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlctl.follow import Progress, Row, accuracy
from rlctl.plot import braille
from rlctl_train.config.errors import UserError

SCHEMA_VERSION = 1
Output = Literal["text", "json", "yaml"]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Form of the answer: text, json or yaml.")]
STEP_WORDS = {"train": "step", "validation": "validation at step", "warm_start": "warm start"}
LINE_EVERY_S = 5.0
"""Between two lines of progress where there is no terminal."""
PIPE_WIDTH = 4000
"""Columns of a stdout that is no terminal: nothing is cut that another program reads."""


def document(output: Output, **content: Any) -> bool:
    """Print `content` as JSON or YAML with its schema_version; return False when text is wanted instead."""
    record = {"schema_version": SCHEMA_VERSION, **content}
    if output == "json":
        text(json.dumps(record, indent=2, ensure_ascii=False))
    elif output == "yaml":
        import yaml  # costs a tenth of the start-up time, and only this branch needs it

        text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True).rstrip())
    return output != "text"


def text(line: str) -> None:
    """Print data as it is."""
    sys.stdout.write(f"{line}\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table of data."""
    grid = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    grid.columns[0].no_wrap = True
    grid.columns[-1].overflow = "fold"
    for row in rows:
        grid.add_row(*(Text(cell(value)) for value in row))
    console = _stdout()
    with console.capture() as capture:
        console.print(grid)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def cell(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def heading(line: str) -> None:
    """Print the title of a part of the data."""
    _stdout().print(Text(line, style="bold"))


def say(line: str) -> None:
    """Print talk: what happens, what to do next."""
    _stderr().print(Text(line), soft_wrap=True)


def note(line: str) -> None:
    """Print something the person should know but need not act on."""
    _stderr().print(Text.assemble(("note: ", "yellow"), line), soft_wrap=True)


def error(what: str, remedy: str) -> None:
    """Print a failure and the way out, a line each."""
    console = _stderr()
    console.print(Text.assemble(("error: ", "bold red"), _one_line(what)), soft_wrap=True)
    console.print(Text.assemble(("  -> ", "bold"), _one_line(remedy)), soft_wrap=True)


def ask(question: str, *, costs: bool) -> bool:
    """Ask for a yes on a terminal. Without one nobody is asked: what `costs` money or results is refused."""
    if sys.stdin.isatty():
        return typer.confirm(question, default=not costs, err=True)
    if costs:
        raise UserError(f"{question} There is no terminal to ask on", "give --yes (-y) to answer before")
    return True


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to tell bytes done and of all: a bar with rate and time left, off a terminal a line at times."""
    console = _stderr()
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(what)
        return
    from rich import progress as rich_progress  # costs a tenth of the start-up time, and only this branch needs it

    columns = (
        rich_progress.TextColumn(what), rich_progress.BarColumn(), rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(), rich_progress.TimeRemainingColumn(),
    )  # fmt: skip
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress for a log: a line every few seconds, none for what is over sooner."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = self._told = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._told < LINE_EVERY_S:
            return
        self._told = now
        rate = (done - self._first) / (now - self._began)
        left = f", {duration((total - done) / rate)} left" if rate > 0 else ""
        say(f"{self._what}: {size(done)} of {size(total)}, {size(rate)}/s{left}")


def size(num_bytes: float) -> str:
    """Return a number of bytes as a person says it."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def plots(curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Print each curve as a small plot."""
    for name, points in curves.items():
        heading(f"\n{name}")
        for line in braille(points):
            text(line)


def step_line(row: Row, num_steps: int) -> None:
    """Print one line for a step, or for a validation; other rows of the metrics are not for the eye."""
    phase = STEP_WORDS.get(row["phase"])
    if phase is None:
        return
    count = f"/{num_steps}" if row["phase"] == "train" else ""
    shown = {
        "reward": row.get("critic/score/mean"),
        "accuracy": accuracy(row),
        "loss": row.get("train/loss"),
        "length": row.get("response_length/mean"),
        "tokens/s": row.get("perf/throughput"),
        "seconds": row.get("timing_s/step"),
    }
    values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
    say(f"{phase} {row['step']}{count}  {values}")


class LiveView:
    """The one view of a running run on a terminal: phase, bar, reward, accuracy, rate, time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since = time.monotonic()
        self._live = Live(console=_stderr(), refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._live.__exit__(*details)

    def say(self, line: str) -> None:
        """Print talk above the view."""
        self._live.console.print(Text(line))

    def show(self, progress: Progress) -> None:
        """Redraw."""
        status = progress.status
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self._name, style="bold"), Text(f"{status.state}: {status.phase}"),
            ProgressBar(total=max(status.num_steps, 1), completed=status.step, width=30),
            f"step {status.step}/{status.num_steps}",
        )  # fmt: skip
        facts = {
            "reward": progress.reward,
            "accuracy": progress.accuracy,
            "tokens/s": progress.tokens_per_s,
        }
        words = [f"{name} {value:.4g}" for name, value in facts.items() if value is not None]
        words.append(f"elapsed {duration(time.monotonic() - self._since)}")
        if progress.left_s is not None:
            words.append(f"left {duration(progress.left_s)}")
        self._live.update(Group(bar, Text("  ".join(words))))


def live_view(name: str) -> LiveView | None:
    """Return a live view where stderr is a terminal that can redraw, else None."""
    console = _stderr()
    return LiveView(name) if console.is_terminal and not console.is_dumb_terminal else None


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _stdout() -> Console:
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _stderr() -> Console:
    return Console(file=sys.stderr, highlight=False)
