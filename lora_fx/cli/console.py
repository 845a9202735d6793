"""What the command line shows: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lora_fx.errors import AdapterWarning
from lora_fx.io.strict_json import to_json

_NARROWEST = 20  # columns that words fit into


def show(as_json: bool, report: Mapping[str, Any], text: str) -> None:
    """Prints a result on stdout: as JSON alone, or as text."""
    shown = to_json(report) if as_json else text
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = shown if as_json else fitted(shown, sys.stdout)
    readable = shown.encode(encoding, "backslashreplace").decode(encoding)
    print(readable, flush=True)  # what cannot be written is told now, not when Python ends


def fitted(text: str, stream: TextIO) -> str:
    """A text whose lines are no wider than the terminal that they go to, as far as words allow.

    What goes into a file or to another program stays as it is, unless ``COLUMNS`` says how wide.
    """
    said = os.environ.get("COLUMNS", "")
    if not said.isdecimal() and not stream.isatty():
        return text
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    return "\n".join(_folded(line, width) for line in text.split("\n"))


def _folded(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    narrow = indent + "  ".join(re.split(r"\s{2,}", line.strip()))  # columns of a table are no use
    return textwrap.fill(
        narrow, width, subsequent_indent=f"{indent}    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


@contextmanager
def stages(lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Runs long work, and shows the name of the stage that it is told if a person watches.

    Whatever a library prints meanwhile goes to stderr: stdout is for results.

    Args:
        lines: leave a line for each stage with its seconds, whether a person watches or not.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        warnings.simplefilter("ignore")  # those of libraries; ours is for the user
        warnings.simplefilter("always", AdapterWarning)
        warnings.showwarning = _show_warning
        log = _Log(bar, lines)
        try:
            yield log.start
        finally:
            log.end()


class _Log:
    """The spinner, and the lines that it leaves behind."""

    def __init__(self, bar: Progress, lines: bool) -> None:
        self._bar, self._lines = bar, lines
        self._task = bar.add_task("starting", total=None)
        self._name = ""
        self._start = 0.0

    def start(self, name: str) -> None:
        """Ends the stage before, and starts one."""
        self.end()
        self._name, self._start = name, time.perf_counter()
        self._bar.reset(self._task, description=name)
        if self._lines and self._bar.disable:
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Says how long the stage took, if one runs."""
        if not self._lines or not self._name:
            return
        took = f"{time.perf_counter() - self._start:.1f} s"
        if self._bar.disable:
            print(took, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(f"{self._name}  {took}", markup=False, highlight=False)
        self._name = ""


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(fitted(f"warning: {message}", sys.stderr), file=sys.stderr)
