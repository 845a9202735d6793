"""What the command line says, and exits with, when a command raises: one message, always."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Collection

from lora_fx.cli.advice import in_options
from lora_fx.cli.console import fitted
from lora_fx.cli.interrupts import INTERRUPTED, has_come
from lora_fx.cli.user_code import users_line, words
from lora_fx.errors import (
    AdapterError,
    ExportError,
    LoraFxError,
    PassError,
    TraceError,
    VerificationError,
    is_out_of_memory,
    says_what_to_do,
)

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
    told = f"error: {_message(error, options, every)}"
    print(fitted(told, sys.stderr), file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 1 if isinstance(error, VerificationError) else 2


# What a message says in place of a step: what would have been right.
_RIGHT = re.compile(r"\b(expected|there are|one of|supported|takes|needs|pip install)\b")
# The step where a message has none, by what it is about.
_STEPS: dict[type[LoraFxError], str] = {
    AdapterError: "use the adapter as it was saved, with the base that it was trained on",
    TraceError: "change what it names in the model, or give module:function of one that is traced",
    PassError: "export it unmerged, or in a wider dtype",
    ExportError: "give the files as they were written, or write them again",
    LoraFxError: "correct what it names, as the help of the command says",
}


def _told(error: LoraFxError, options: Collection[str], every: Collection[str]) -> str:
    text = in_options(str(error), options, every)  # a step that is none here is no step
    if says_what_to_do(text) or _RIGHT.search(text):
        return text
    step = next(step for kind, step in _STEPS.items() if isinstance(error, kind))
    return f"{text}; {step}"


def _message(error: BaseException, options: Collection[str], every: Collection[str]) -> str:
    if isinstance(error, LoraFxError):
        return _told(error, options, every)
    if is_out_of_memory(error):
        return "MemoryError: there is not enough memory: free some, or take a smaller model"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenPipeError):
        return "the reader of the output closed it before everything was written"
    line = users_line(error)
    if isinstance(error, OSError) and not line:
        return f"{words(error)}: free what it names, or give another place"
    if line or isinstance(error, MemoryError | SystemExit):
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
