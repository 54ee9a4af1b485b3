"""A group of commands that shows its help when it is called with nothing."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class HelpfulGroup(TyperGroup):
    """A command with verbs below it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take no arguments as a question for help."""
        return super().parse_args(ctx, args or ["--help"])
