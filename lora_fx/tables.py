"""Tables as HTML, for notebooks and for the report: the one place that makes them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Rows = Iterable[Sequence[object]]
_LONG = 32  # letters of a text that may be broken into lines


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()

    def __html__(self) -> str:
        """Itself, as libraries ask for it."""
        return str(self)

    @classmethod
    def of(cls, tag: str, text: str) -> Html:
        """An element that holds a text."""
        return cls(f"<{tag}>{html.escape(text)}</{tag}>")


def table(head: Sequence[str], rows: Rows, caption: str = "") -> str:
    """A table; every cell is escaped, but `Html`.

    Args:
        head: of the columns.
        rows: cells: text, numbers, None where there is nothing to say.
        caption: what the table is of.
    """
    title = Html.of("caption", caption) if caption else ""
    top = "".join(Html.of("th", name) for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{title}<tr>{top}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td style="text-align:right">{number(value)}</td>'
    text = "" if value is None else str(value)
    mark = ' class="long"' if len(text) > _LONG else ""
    return f"<td{mark}>{html.escape(text)}</td>"


def number(value: float) -> str:
    """A number in few digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
