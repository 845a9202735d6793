"""How --help is laid out: plain text, as wide as the terminal, readable at 40 columns."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

_WIDEST = 100
# What typer derives a page from has no public name in every typer.
_Context: Any = TyperGroup.context_class
_Formatter: Any = _Context.formatter_class


class Columns(_Formatter):  # type: ignore[misc]
    """Keeps to the terminal's width, where the class that it is of takes 50 columns at least."""

    def __init__(self, width: int | None = None, max_width: int | None = None) -> None:
        wide = shutil.get_terminal_size().columns if width is None else width
        super().__init__(width=min(wide, max_width or _WIDEST), max_width=max_width)

    def write_dl(
        self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Gives names a third of the width; what is longer has a line of its own."""
        super().write_dl(rows, min(col_max, self.width // 3), col_spacing)


class PageContext(_Context):  # type: ignore[misc]
    """Where a command is called."""

    formatter_class = Columns


class Command(TyperCommand):
    """A command with such a page, and its first sentence in the list of all."""

    context_class = PageContext

    def get_short_help_str(self, limit: int = 45) -> str:
        """The sentence, whole: it is wrapped, not cut."""
        return " ".join((self.help or "").partition("\n\n")[0].split())


class Group(TyperGroup):
    """Commands with such a page."""

    context_class = PageContext
