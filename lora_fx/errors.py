"""The typed errors: each message names what was found, what was expected, and what to do."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class LoraFxError(Exception):
    """Base of every error that a caller of lora_fx may catch."""


class TraceError(LoraFxError):
    """A model could not be turned into a graph."""


class AdapterError(LoraFxError):
    """An adapter is malformed, unsupported, or does not fit the model."""


class PassError(LoraFxError):
    """A pass produced, or was given, a graph that it cannot work on."""


class ExportError(LoraFxError):
    """A model could not be written, read or run as ONNX."""


class VerificationError(ExportError):
    """The exported model and eager disagree, or the control that must fail did not."""


class AdapterWarning(UserWarning):
    """An adapter is usable but probably not what was meant, such as one without effect."""


def shorten(names: list[str], limit: int = 10) -> str:
    """Joins names for a message: all of them up to ``limit``, then how many more there are."""
    shown = ", ".join(names[:limit])
    hidden = len(names) - limit
    return f"{shown}, and {hidden} more" if hidden > 0 else shown


@contextmanager
def within(where: object) -> Iterator[None]:
    """Puts ``where`` (a file, a layer, an adapter) before the message of any error raised inside.

    The error stays what it was: type, cause and traceback. Borders nest, the outermost first.
    Warnings are not inside, nor is what a tensor or a generator computes after the block.
    """
    try:
        yield
    except LoraFxError as error:
        error.args = (f"{where}: {error}",)
        raise


def doubt(where: object, message: str, otherwise: str, strict: bool) -> None:
    """Refuses what is suspicious, or without ``strict`` warns of it, at the line that loads.

    Whoever calls it is within ``where``, which no warning is.
    """
    if strict:
        raise AdapterError(message + otherwise)
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("lora_fx."):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{where}: {message}", AdapterWarning, stacklevel=level)


# How a clause begins that says what to do.
_VERBS = (
    "add|apply|ask|call|choose|combine|convert|copy|correct|create|download|drop|export|fold|free|"
    "fuse|give|inspect|install|keep|leave|let|load|make|merge|name|pass|put|read|remove|rename|"
    "report|return|save|say|set|strip|take|trace|train|try|use|wrap|write"
)
# A space before and behind: ``module:make`` and ``report.json`` are no steps, nor is ``a/name``.
_STEP = re.compile(
    rf"(?:^|[;:,.!?] |\(|\b(?:or|and|please) |\n)(?:{_VERBS})(?=[ :\n])", re.IGNORECASE
)


def says_what_to_do(text: str) -> bool:
    """Whether a message names the next step."""
    return _STEP.search(text) is not None


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Ends the message of any error raised inside by what to do, unless it says that itself.

    Who finds what is wrong with a tensor does not know where its file is from; a border does.
    """
    try:
        yield
    except LoraFxError as error:
        if not says_what_to_do(str(error)):
            error.args = (f"{str(error).rstrip('.')}; {advice}",)
        raise


# What torch, onnxruntime and a system raise as they raise anything else.
_OUT_OF_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "not enough memory", "bad_alloc",
    "bad allocation",
)  # fmt: skip
NO_MEMORY = "there is not enough memory: free some, or take a smaller one"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, whoever raised it, says that there is no memory left."""
    is_foreign = isinstance(error, Exception) and not isinstance(error, LoraFxError)
    says_so = is_foreign and any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or says_so


@contextmanager
def memory_told(where: object, kind: type[LoraFxError]) -> Iterator[None]:
    """Makes an error of the type ``kind`` of whatever says inside that memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(f"{where}: {NO_MEMORY}") from error
