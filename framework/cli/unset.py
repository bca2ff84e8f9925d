"""What a variable of the shell that isn't set leaves on the command line: an option or an argument that is empty."""

from __future__ import annotations

from typing import Any

from typer import Typer
from typer.core import TyperCommand

from preceptor.errors import ConfigError


class NoneEmpty(TyperCommand):
    """A command that refuses what is given as an empty string: it would count as not given, or as the folder here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return what is left of the command line.

        Raises:
            ConfigError: Naming what is empty, and what it takes.
        """
        written, _, _ = self.make_parser(ctx).parse_args(args=list(args))  # a path is a Path later, and "" the folder
        left = super().parse_args(ctx, args)
        for parameter in self.params:
            value = written.get(parameter.name or "")
            if value == "" or (isinstance(value, list) and "" in value):
                raise ConfigError(_told(parameter))
        return left


def refuse_empty(app: Typer) -> None:
    """Make every command of an app, and of those within it, one that refuses what is empty."""
    for command in app.registered_commands:
        command.cls = NoneEmpty
    for group in app.registered_groups:
        if group.typer_instance is not None:
            refuse_empty(group.typer_instance)


def _told(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    name = parameter.opts[0] if is_option else parameter.metavar or str(parameter.name).upper()
    advice = "Give it a value" if parameter.required else "Leave it out, or give it a value"
    told = f" ({parameter.help.rstrip('.')})" if parameter.help else ""
    return f"{name} is empty: is a variable of the shell unset? {advice}{told}."
