"""What the command line says, and exits with, when a command raises: one message, always."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Collection

from lora_fx.cli.advice import in_options
from lora_fx.cli.console import fitted
from lora_fx.cli.interrupts import INTERRUPTED, has_come
from lora_fx.cli.user_code import users_line, words
from lora_fx.errors import LoraFxError, VerificationError, is_out_of_memory

TRACEBACK = "LORA_FX_TRACEBACK"


def report(error: BaseException, options: Collection[str] = (), every: Collection[str] = ()) -> int:
    """Prints one message on stderr, and gives the exit code.

    The environment variable ``LORA_FX_TRACEBACK`` shows the traceback too.

    Args:
        error: what was raised.
        options: of the command that was called.
        every: the options of all commands.
    """
    if has_come():
        error = KeyboardInterrupt()  # whatever was made of it on its way
    if isinstance(error, BrokenPipeError):
        _give_up_stdout()
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    told = f"error: {in_options(_message(error), options, every)}"
    print(fitted(told, sys.stderr), file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 1 if isinstance(error, VerificationError) else 2


def _message(error: BaseException) -> str:
    if isinstance(error, LoraFxError):
        return str(error)
    if is_out_of_memory(error):
        return "MemoryError: there is not enough memory: free some, or take a smaller model"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenPipeError):
        return "the reader of the output closed it before everything was written"
    line = users_line(error)
    if line or isinstance(error, OSError | MemoryError | SystemExit):
        return words(error) + line
    if isinstance(error, ImportError):
        return f"{words(error)}: install what is missing: pip install lora-fx"
    return (
        f"{words(error)}: this is a defect of lora-fx; set {TRACEBACK}=1 to see the traceback, "
        "and report it with the command"
    )


def _give_up_stdout() -> None:
    """Python writes what is left when it ends, and would complain again."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process runs
