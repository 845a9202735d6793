"""The command line.

Exit codes: 0 done and verified, 1 verification failed, 2 anything else, 130 interrupted.
"""

from __future__ import annotations

import gc
import logging
import os
import sys

from lora_fx.cli.interrupts import interruptible


def main(arguments: list[str] | None = None) -> None:
    """Runs a command, and ends the process with its exit code."""
    _open_streams()
    gc.set_threshold(50_000, 20, 50)  # what is imported is kept: a fifth of its time was looked in
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # what is wrong is said by our error
    with interruptible():
        from lora_fx.cli.program import app  # here, so that Ctrl-C is heard while it is loaded

        app(arguments, prog_name="lora-fx")


def _open_streams() -> None:
    """Gives those that are closed, as by ``>&-``, a place: a file that is written would take it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # while the process runs
