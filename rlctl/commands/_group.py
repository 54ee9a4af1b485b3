"""Groups of commands: one that shows its help when called with nothing, one whose bare word is a name."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class HelpfulGroup(TyperGroup):
    """A command with verbs below it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take no arguments as a question for help."""
        return super().parse_args(ctx, args or ["--help"])


class BareName(HelpfulGroup):
    """A group in which a word that is no verb is the argument of its hidden command `resolve`."""

    bare = "resolve"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give options that stand before any word to the hidden command."""
        own = args[:1] == ["--help"] or not args or not args[0].startswith("-")
        return super().parse_args(ctx, args if own else [self.bare, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Take an unknown verb as the argument of the hidden one."""
        if args and args[0] not in self.commands:
            return self.bare, self.commands[self.bare], args
        return super().resolve_command(ctx, args)
