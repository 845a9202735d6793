"""Tables as HTML, for notebooks and for the report: the one place that makes them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Rows = Iterable[Sequence[object]]
_LONG = 32  # letters of a text that may be broken into lines


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *inner: str, **attributes: object) -> Html:
    """An element; all that it holds is text, but `Html`.

    Args:
        tag: its name.
        inner: what it holds.
        attributes: a name that Python has no spelling for with ``_``: ``class_``, ``fill_opacity``.
    """
    given = (
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
    )
    held = (part if isinstance(part, Html) else html.escape(part) for part in inner)
    return Html(f"<{tag}{''.join(given)}>{''.join(held)}</{tag}>")


def table(head: Sequence[str], rows: Rows, caption: str = "") -> Html:
    """A table; every cell is escaped, but `Html`.

    Args:
        head: of the columns.
        rows: cells: text, numbers, None where there is nothing to say.
        caption: what the table is of.
    """
    title = [element("caption", caption)] if caption else []
    top = element("tr", *(element("th", name) for name in head))
    return element("table", *title, top, *(element("tr", *map(_cell, row)) for row in rows))


def _cell(value: object) -> Html:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return element("td", number(value), style="text-align:right")
    text = value if isinstance(value, str) else "" if value is None else str(value)
    is_long = len(text) > _LONG and not isinstance(text, Html)
    return element("td", text, class_="long") if is_long else element("td", text)


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
