"""Regexes that come out of a file: run as PEFT runs them, and not for longer than a moment."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import regex

from lora_fx.errors import AdapterError

MAX_LENGTH = 256  # of a regex that is written: a longer one is a list of names instead
_MAX_COMPILED = 1 << 16  # characters: compiling takes time too, and nothing limits that
_SECONDS = 0.5  # for all paths together
_USUAL = 0.002  # what a match may take that is not counted: a usual one takes microseconds

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_TOKEN = re.compile(rf"\(\?#[^)]*\)|\\.|{_CLASS.pattern}|\{{(?:\d+,?\d*|,\d*)\}}|\{{", re.DOTALL)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


class SlowRegexError(AdapterError):
    """A regex could not be run in time: what it means is unknown."""


class BoundedRegex:
    """A regex of which all matches together take half a second at most.

    Args:
        pattern: as the file has it.
        compiled: what is run; None for what is not tried.
        field: where it comes from, for the message.
    """

    def __init__(self, pattern: str, compiled: Any, field: str) -> None:
        self.pattern = pattern
        self._compiled = compiled
        self._field = field
        self._left = 0.0 if compiled is None else _SECONDS

    def match(self, text: str) -> Any:
        """As `re.Pattern.match`.

        Raises:
            SlowRegexError: the time is over, in this match or in one before.
        """
        return self._run("match", text)

    def fullmatch(self, text: str) -> Any:
        """As `re.Pattern.fullmatch`.

        Raises:
            SlowRegexError: as `match`.
        """
        return self._run("fullmatch", text)

    def _run(self, how: str, text: str) -> Any:
        if self._left <= 0:
            raise self._slow(text)
        run: Callable[..., Any] = getattr(self._compiled, how)
        begin = time.process_time()
        try:
            return run(text, timeout=self._left)
        except (TimeoutError, MemoryError) as error:
            self._left = 0.0
            raise self._slow(text) from error
        finally:
            taken = time.process_time() - begin
            self._left -= taken if taken > _USUAL else 0.0

    def _slow(self, text: str) -> SlowRegexError:
        return SlowRegexError(
            f"{self._field}: the regex {_shown(self.pattern)!r} ({len(self.pattern)} characters) "
            f"is not done with {text!r:.60} in {_SECONDS} s, expected one that ends at once; give "
            "a list of module names instead"
        )


@lru_cache(maxsize=65536)
def compile_bounded(pattern: str, field: str) -> BoundedRegex:
    """Compiles a regex of a file: it means what it means to Python's ``re``, which PEFT runs.

    Args:
        pattern: the regex.
        field: where it comes from, for the message.

    Raises:
        AdapterError: the regex is malformed.
    """
    if len(pattern) > _MAX_COMPILED:
        return BoundedRegex(pattern, None, field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what may mean something once
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{field}: {_shown(pattern)!r} is not a regex: {error}; correct it, or give a list of "
            "module names"
        ) from error
    return BoundedRegex(pattern, _compiled(pattern), field)


def _compiled(pattern: str) -> Any:
    """What is run in place of a regex, or None if nothing is known to mean the same."""
    plain = _TOKEN.sub(_plain, pattern)
    if plain != pattern and _VERBOSE.search(pattern):  # where a comment may hold anything
        return None
    try:
        return regex.compile(plain, regex.VERSION0)
    except (regex.error, OverflowError, RecursionError, MemoryError):
        return None


def _plain(token: re.Match[str]) -> str:
    """A part of a regex without what means more to ``regex`` than to ``re``.

    ``(a){e<=1}`` is a fuzzy match there and ``[[:alpha:]]`` a class of letters.
    """
    text = token.group()
    if text == "{":
        return r"\{"
    if text.startswith("(?#"):
        return ""
    if text.startswith("["):
        return "[" + re.sub(r"(\\.)|\[", lambda m: m[1] or r"\[", text[1:], flags=re.DOTALL)
    return text


def _shown(pattern: str) -> str:
    return pattern if len(pattern) <= 80 else pattern[:77] + "..."
