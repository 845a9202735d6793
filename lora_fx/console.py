"""What the command line shows: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lora_fx.errors import AdapterWarning


def show(as_json: bool, report: Mapping[str, Any], text: str) -> None:
    """Prints a result on stdout: as JSON alone, or as text."""
    sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) if as_json else text)
    sys.stdout.write("\n")


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Runs long work, and shows the name of the stage that it is told if a person watches.

    Whatever a library prints meanwhile goes to stderr: stdout is for results.
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
        task = bar.add_task("starting", total=None)
        yield lambda name: bar.update(task, description=name)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
