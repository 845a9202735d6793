"""The program: its commands, and the one place where what they raise becomes a message."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer

import lora_fx
from lora_fx.cli.adapter_commands import adapter, diff, inspect
from lora_fx.cli.completion import answer_shells
from lora_fx.cli.error_exit import report as report_failure
from lora_fx.cli.file_commands import add_lora, merge, quantize
from lora_fx.cli.help_page import Command, Group
from lora_fx.cli.model_commands import export, verify
from lora_fx.cli.tool_commands import completion, demo, doctor, report

# Usage errors, which typer shows itself; what they derive from has no public name in every typer.
_USAGE: type[Exception] = next(
    kind
    for kind in typer.BadParameter.__mro__
    if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)
# An argument of no characters, or an option's value that is none.
_NOTHING = re.compile(r"(--[\w-]+=)?")


class Commands(Group):
    """The one place where whatever a command raises becomes a message and an exit code.

    It stands inside typer, which ends with 1 where a pipe was closed or an input had ended.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Refuses an empty text, which as a path would be the directory where the shell stands."""
        empty = next((i for i, text in enumerate(args) if _NOTHING.fullmatch(text)), None)
        if empty is not None and not ctx.resilient_parsing:
            told = args[empty] or [ctx.info_name, *args][empty]  # an option, or what is before it
            raise typer.BadParameter(f"nothing is given at {told}: give a value, or leave it out")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _USAGE):
            raise
        except BaseException as error:
            options = {name: _options(command) for name, command in self.commands.items()}
            own = options.get(ctx.invoked_subcommand or "", frozenset())
            sys.exit(report_failure(error, own, frozenset().union(*options.values())))


def _options(command: Any) -> frozenset[str]:
    """What a command takes beside its arguments."""
    names = (name for parameter in command.params for name in parameter.opts)
    return frozenset(name for name in names if name.startswith("-"))


app = typer.Typer(
    cls=Commands,
    name="lora-fx",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora-fx {lora_fx.__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """From a PyTorch model with LoRA adapters to verified ONNX, merged or swappable."""


for command in (
    *(export, adapter, merge, add_lora, quantize, inspect, verify, report, diff),
    *(doctor, demo, completion),
):
    app.command(cls=Command)(command)

answer_shells()
