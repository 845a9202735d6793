"""Regexes that come out of a file: run as PEFT runs them, and not for longer than a moment."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any

import regex

from lora_fx.errors import AdapterError

MAX_LENGTH = 256  # of a regex that is written: a longer one is a list of names instead
_MAX_COMPILED = 1 << 16  # characters: compiling takes time too, and nothing limits that
_MOST_REPEATED = 1000  # parts that repeats may add: `regex` writes out (a{99}){99}, and ((a+)+)+
_MOST = 2000  # regexes of one field, which have as many characters together
_SECONDS = 0.5  # for all paths together
_USUAL = 0.002  # what a match may take that is not counted: a usual one takes microseconds

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_TOKEN = re.compile(rf"\(\?#[^)]*\)|\\.|{_CLASS.pattern}|\{{(?:\d+,?\d*|,\d*)\}}|\{{", re.DOTALL)
_PART = re.compile(rf"{_TOKEN.pattern}|.", re.DOTALL)
_REPEAT = re.compile(r"\+|\{(\d+)(?:,\d*)?\}")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
# A name that is a regex of itself: a dot in it is any character, unless it is escaped.
NAME = re.compile(r"(\^?)((?:[A-Za-z0-9_-]|\\?\.)+)\$?")


class SlowRegexError(AdapterError):
    """A regex could not be run in time: what it means is unknown."""


class BoundedRegex:
    """A regex of which all matches together take half a second at most.

    Args:
        pattern: as the file has it.
        field: where it comes from, for the message.
    """

    def __init__(self, pattern: str, field: str) -> None:
        self.pattern = pattern
        self._field = field
        self._left = _SECONDS

    @cached_property
    def _compiled(self) -> Any:
        """What is run; None for what is not tried. A regex of which no path is asked is neither."""
        return _compiled(self.pattern)

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
        if self._left <= 0 or self._compiled is None:
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
        return BoundedRegex(pattern, field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what may mean something once
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:  # of a count too long
        raise AdapterError(
            f"{field}: {_shown(pattern)!r} is not a regex: {error}; correct it, or give a list of "
            "module names"
        ) from error
    return BoundedRegex(pattern, field)


def check_regexes(patterns: Iterable[str], field: str) -> None:
    """Refuses a malformed regex among those of a field, and more than can be run in a moment.

    Raises:
        AdapterError: names the field and the regex.
    """
    written = [pattern for pattern in patterns if not NAME.fullmatch(pattern)]
    size = sum(map(len, written))
    if len(written) > _MOST or size > _MAX_COMPILED:
        raise AdapterError(
            f"{field}: {len(written)} regexes of {size} characters, expected at most {_MOST} of "
            f"{_MAX_COMPILED}, beside plain names: give the names of the layers"
        )
    for pattern in written:
        compile_bounded(pattern, field)


def _compiled(pattern: str) -> Any:
    """What is run in place of a regex, or None if nothing is known to mean the same."""
    if len(pattern) > _MAX_COMPILED:
        return None
    plain, has_comments = _TOKEN.sub(_plain, pattern), _VERBOSE.search(pattern)
    if has_comments and (plain != pattern or "{" in plain):  # a comment may hold anything
        return None
    if _repeated(plain) > _MOST_REPEATED + len(plain):
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
        return "[" + re.sub(r"(\\.)|\[", lambda m: m[1] or r"\[", text[1:])
    return text


def _repeated(pattern: str) -> int:
    """How many parts the repeats of a regex add, once what they ask for is written out."""
    groups = [0]  # the parts of each group that is open
    last = added = 0
    for part in _PART.finditer(pattern):
        repeat = _REPEAT.fullmatch(part.group())
        if part.group() == "(":
            groups.append(0)
        elif repeat is not None:
            more = last * int(repeat[1] or 1)
            groups[-1] += more
            added += more
        else:
            is_group = part.group() == ")" and len(groups) > 1
            last = groups.pop() if is_group else 1
            groups[-1] += last
    return added


def _shown(pattern: str) -> str:
    return pattern if len(pattern) <= 80 else pattern[:77] + "..."
