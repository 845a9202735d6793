"""Tables as HTML, for notebooks and for the report: the one place that makes them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Rows = Iterable[Sequence[object]]


def table(head: Sequence[str], rows: Rows, caption: str = "") -> str:
    """A table; every cell is escaped, but what says by ``__html__`` that it is HTML already.

    Args:
        head: of the columns.
        rows: cells: text, numbers, None where there is nothing to say.
        caption: what the table is of.
    """
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{title}<tr>{top}</tr>{body}</table>"


def _cell(value: object) -> str:
    if hasattr(value, "__html__"):
        return f"<td>{value.__html__()}</td>"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td style="text-align:right">{number(value)}</td>'
    return f"<td>{'' if value is None else html.escape(str(value))}</td>"


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
