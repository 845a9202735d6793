"""The commands that show or prepare: report, doctor, demo, completion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_fx import choices
from lora_fx.cli.console import show, stages
from lora_fx.cli.options import AsJson, Force, offered


def report(
    out: Annotated[Path, typer.Argument(help="A directory that export wrote.")],
    to: Annotated[
        Path | None, typer.Option("-o", "--out", help="The page; OUT/report.html by default.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a page on an export: each layer's update, drawings, verification, in one HTML file."""
    from lora_fx.cli.pages import make_page

    with stages():
        page, told = make_page(out, to, force)
    show(as_json, {"path": str(page), "verified": told.verified}, f"written to {page}")


def doctor(as_json: AsJson = False) -> None:
    """Show versions and providers, hold them to what is promised, and try a tiny export.

    Exit codes: 0 all is as promised, 1 the self-test is wrong, 2 a version is not as promised.
    """
    from lora_fx.cli.doctor import examined

    with stages() as progress:
        progress("self-test")
        health = examined()
    show(as_json, health.to_dict(), str(health))
    health.judge()


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory to write.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Train two adapters of a sentence encoder, export, swap and score them."""
    from lora_fx.demo import run, table

    with stages(lines=True) as progress:
        result = run(out, progress)
    show(as_json, result.to_dict(), table(result))


def completion(
    shell: Annotated[str, offered(choices.Shell, help="The shell", metavar="SHELL")],
) -> None:
    """Print what completes commands, options and their words in a shell.

    For bash: lora-fx completion bash >> ~/.bashrc
    """
    from lora_fx.cli.completion import script

    typer.echo(script(shell))
