"""The command: a table of verbs imported on use, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from rlctl import __version__
from rlctl.commands._group import HelpfulGroup
from rlctl_train.config.errors import FAILED, INTERRUPTED, PREFLIGHT, USAGE, UserError

COMMANDS = {
    "launch": "rlctl.commands.launch:app",
    "runs": "rlctl.commands.runs:app",
    "preset": "rlctl.commands.preset:app",
    "config": "rlctl.commands.config:app",
    "plan": "rlctl.commands.plan:app",
    "hw": "rlctl.commands.hw:app",
    "profile": "rlctl.commands.profile:app",
    "calibrate": "rlctl.commands.calibrate:app",
    "doctor": "rlctl.commands.doctor:app",
    "env": "rlctl.commands.env:app",
    "data": "rlctl.commands.data:app",
    "reward": "rlctl.commands.reward:app",
    "ckpt": "rlctl.commands.ckpt:app",
}
HELP = {
    "Train": {
        "launch": "Start a run from a preset or a file.",
        "runs": "List, show, follow, stop, resume and compare runs.",
    },
    "Decide": {
        "preset": "Show presets, and what one becomes on this machine.",
        "config": "Check a configuration, explain its keys, print its schema.",
        "plan": "Say what fits on the hardware, and why.",
    },
    "Look": {
        "hw": "Survey this machine.",
        "profile": "Show where time and memory of a step go.",
        "calibrate": "Measure this machine by a short run, and correct its plans by it.",
        "doctor": "Examine this machine, and whether a run can start on it.",
        "env": "Print versions and environment, secrets removed.",
    },
    "Prepare": {
        "data": "Prepare and check training data.",
        "reward": "Score responses outside a run.",
    },
    "Keep": {
        "ckpt": "List, inspect, merge, reshard, verify, compare and prune checkpoints.",
    },
}
EPILOG = (
    "Exit codes: 0 ok; 1 failed at run time; 2 wrong usage or invalid config; 3 does not fit, or a gate failed; "
    "4 preflight failed; 5 launch or remote failed; 130 interrupted."
)


class LazyGroup(HelpfulGroup):
    """A group that knows its commands by name and one line, and imports one only to run it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for verbs in HELP.values():
            for name, line in verbs.items():
                self.add_command(TyperCommand(name, callback=None, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command by name, then import the real one."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, load(name) if name is not None else stub, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one list of commands per task."""
        for task, verbs in HELP.items():
            with formatter.section(task):
                formatter.write_dl(list(verbs.items()))


app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, epilog=EPILOG)


def load(name: str) -> Any:
    """Import a command."""
    module, _, attribute = COMMANDS[name].partition(":")
    command = get_command(getattr(importlib.import_module(module), attribute))
    command.name = name
    command.params = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
    return command


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def rlctl(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Post-train language models with reinforcement learning; knows the machine it runs on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    head = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in head
    sys.exit(run([word for word in head if word != "--debug"] + arguments[len(head) :], debug=debug))


def run(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code: the one error boundary."""
    try:
        result = get_command(app).main(list(arguments), prog_name="rlctl", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the process boundary: every failure ends as lines and an exit code
        if debug:
            import traceback

            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    from rlctl import render

    if isinstance(error, UserError):
        from rlctl.problems import InvalidConfig

        findings = error.findings if isinstance(error, InvalidConfig) else ()
        for what, remedy in [(f.line, f.remedy) for f in findings] or [(error.what, error.remedy)]:
            render.error(what, remedy)
        return error.exit_code
    if isinstance(error, typer.TyperException):
        command = getattr(getattr(error, "ctx", None), "command_path", "rlctl")
        render.error(error.format_message(), f"see `{command} --help`")
        return USAGE
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        render.error(str(error), "free some space and try again" if full else "see the traceback with --debug")
        return PREFLIGHT if full else FAILED
    render.error(
        f"{type(error).__name__}: {error}", "this is a fault of rlctl: run it again with --debug and report it"
    )
    return FAILED


if __name__ == "__main__":
    main()
