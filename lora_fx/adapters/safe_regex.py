"""Regexes that come out of a file: bounded before they are run."""

from __future__ import annotations

import re
from functools import lru_cache

from lora_fx.errors import AdapterError

MAX_LENGTH = 256
# Each unbounded repeat multiplies the worst case by the length of the path it runs on.
MAX_REPEATS = 5

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")
_HIDING = re.compile(r"\(\?[a-zA-Z]*x|\(\?#")


@lru_cache(maxsize=65536)
def compile_bounded(pattern: str, field: str) -> re.Pattern[str]:
    """Compiles a user's regex, unless matching it could take unbounded time.

    Args:
        pattern: the regex.
        field: where it comes from, for the message.

    Returns:
        The compiled regex.

    Raises:
        AdapterError: the regex is malformed, longer than 256 characters, repeats a group that
            itself repeats or branches, or has more than five unbounded repeats.
    """
    shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
    if len(pattern) > MAX_LENGTH:
        raise AdapterError(
            f"{field}: the regex {shown!r} has {len(pattern)} characters, at most {MAX_LENGTH} are "
            "run; give a list of module names instead"
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{field}: {shown!r} is not a regex: {error}") from error
    reason = _danger(pattern)
    if reason is not None:
        raise AdapterError(
            f"{field}: the regex {shown!r} {reason}, which can take forever to match; "
            "give a list of module names instead"
        )
    return compiled


def _danger(pattern: str) -> str | None:
    """Says why a well-formed regex may take exponential or steep polynomial time, or None."""
    if _HIDING.search(pattern):
        return "has an inline comment or the verbose flag"
    total = 0
    open_groups = [False]  # per open group: whether it repeats or branches inside
    closed_risky = False  # whether the item just read is a group that does
    position = 0
    while position < len(pattern):
        token = _token(pattern, position)
        position += len(token)
        if token == "(":
            open_groups.append(False)
            position += pattern[position : position + 1] == "?"  # (?: and its kin: no quantifier
        elif token == ")":
            closed_risky = open_groups.pop()
            open_groups[-1] |= closed_risky
            continue
        elif _REPEAT.fullmatch(token) and closed_risky:
            return "repeats a group that itself repeats or branches"
        elif _REPEAT.fullmatch(token) or token in "|?":
            open_groups[-1] = True
            total += token not in "|?"
        closed_risky = False
    return f"has {total} repeats, more than {MAX_REPEATS}" if total > MAX_REPEATS else None


def _token(pattern: str, position: int) -> str:
    """The escape, character class, repeat or single character at a position."""
    if pattern[position] == "\\":
        return pattern[position : position + 2]
    for shape in (_CLASS, _REPEAT):
        found = shape.match(pattern, position)
        if found:
            return found.group()
    return pattern[position]
