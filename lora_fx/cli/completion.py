"""Completion of commands, options and their words in a shell: typer's, told by a command."""

from __future__ import annotations

import os

from lora_fx import choices
from lora_fx.choices import check_choice
from lora_fx.errors import LoraFxError

_PROGRAM, _VARIABLE = "lora-fx", "_LORA_FX_COMPLETE"


def script(shell: str) -> str:
    """What a shell has to read once.

    Raises:
        LoraFxError: it is none that there is a script for.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    check_choice("completion ", shell, choices.Shell, LoraFxError)
    told = get_completion_script(prog_name=_PROGRAM, complete_var=_VARIABLE, shell=shell)
    return str(told)


def answer_shells() -> None:
    """Makes typer answer when such a script asks; its own options that install one are not used."""
    if _VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
