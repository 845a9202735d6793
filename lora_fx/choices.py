"""Words that a caller chooses among: each set is told once, here, as a type.

What is called in Python is annotated with them, the command line offers and completes the same
words, and `check_choice` refuses any other in one way.
"""

from __future__ import annotations

import builtins
from collections import ChainMap, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import formatannotation, signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from re import sub
from sys import modules
from types import UnionType
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from lora_fx.errors import NO_MEMORY, is_out_of_memory

Mode = Literal["merged", "unmerged", "swappable", "required"]
AdapterMode = Literal["constant", "input", "required"]  # `adapters=` of to_onnx
SlotMode = Literal["input", "required"]  # of what has slots in any case
SlotForm = Literal["factors", "vectors", "weight", "invocation"]
Target = Literal["constant", "input"]
Frontend = Literal["auto", "symbolic", "export"]
Combination = Literal["cat", "linear", "svd"]
Bits = Literal[4, 8, "nf4", "fp4"]
BitsOrFloat = Literal[Bits, "float"]
FloatType = Literal["float32", "float16"]  # that onnxruntime's CPU provider runs
SlotFormat = Literal["onnx_adapter", "safetensors"]
Format = Literal[
    "onnx_adapter", "diffusers", "gguf", "mlx", "torchtune", "peft", "peft_file", "kohya", "loralib"
]
FormatOrAuto = Literal["auto", Format]
SavedFormat = Literal["onnx_adapter", "diffusers", "peft", "peft_file", "kohya", "loralib"]
WrittenFormat = Literal[SavedFormat, SlotFormat]  # `--to`
Shell = Literal["bash", "zsh", "fish"]
TaskName = Literal[
    "text2text-generation-with-past",
    "text2text-generation",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "text-generation-with-past",
    "text-generation",
    "automatic-speech-recognition-with-past",
    "automatic-speech-recognition",
    "image-classification",
    "semantic-segmentation",
    "object-detection",
    "zero-shot-image-classification",
    "audio-classification",
    "feature-extraction",
]


def words(choices: Any) -> tuple[str, ...]:
    """The words of a set, as they are typed on a command line."""
    return tuple(map(str, get_args(choices)))


def check_choice(said: str, value: object, choices: Any, error: type[Exception]) -> None:
    """Refuses what is none of a set.

    Args:
        said: what stands before the value in the message: ``"frontend "``, ``"adapters="``.
        value: what was given.
        choices: the type that tells the set.
        error: of which type to raise.

    Raises:
        Exception: of that type; lists the set.
    """
    known = get_args(choices)
    if not any(type(value) is type(one) and value == one for one in known):
        *most, last = map(repr, known)
        listed = f"{', '.join(most)} or {last}" if most else last
        raise error(f"{said}{value!r:.80}: expected {listed}")


P = ParamSpec("P")
R = TypeVar("R")
_RAW = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError)


def takes(
    error: type[Exception], judge: Callable[[Mapping[str, Any]], str | None] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a typed error of what fails in Python's own words because of what it was given.

    So is what says that memory is short. Who does not fail is not asked, so that whatever serves is
    taken. Warnings of what is called so stand one level deeper.

    Args:
        error: of which type to raise.
        judge: from arguments that are of their types to what is wrong with what they name.
    """

    def told(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as failed:
                if is_out_of_memory(failed):
                    of = function.__qualname__.partition(".")[0]
                    raise error(f"{of}: {NO_MEMORY}") from failed
                if not isinstance(failed, _RAW):
                    raise
                wrong = _first_odd(function, args, kwargs)
                if wrong is None and judge is not None:
                    wrong = judge(signature(function).bind(*args, **kwargs).arguments)
                if wrong is not None:
                    raise error(wrong) from failed
                raise

        return called

    return told


def _first_odd(function: Callable[..., Any], args: Any, kwargs: Any) -> str | None:
    """The first argument of a call that is none of those that its annotation says."""
    try:
        given = signature(function).bind(*args, **kwargs).arguments
    except TypeError as unbound:  # too many, too few, or one that there is not
        known = ", ".join(name for name in signature(function).parameters if name != "self")
        called = function.__qualname__.removesuffix(".__init__")
        return f"{called}: {unbound}: give what it takes: {known}"
    return _odd_among("", given, _hints(function, function)) or _odd_inside(list(given.values()))


def _hints(of: Any, *makers: Any) -> dict[str, Any]:
    """Annotations as types: what is imported for type checkers alone is anything here."""
    known = [vars(modules[maker.__module__]) for maker in makers]
    return get_type_hints(of, localns=ChainMap(*known, vars(builtins), defaultdict(lambda: Any)))


def _odd_among(where: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> str | None:
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            expected = sub(r"\w+\.", "", formatannotation(hints[name]))
            step = ": trace the model first, gm = lora_fx.trace(model, args)"
            advice = step if expected == "GraphModule" else ""
            return f"{where}{name} is {value!r:.80}: expected {expected}{advice}"
    return None


def _odd_inside(values: Iterable[Any]) -> str | None:
    """The same of the fields of our own values, which are not asked either where they are made."""
    for value in values:
        kind, inside = type(value), None
        if is_dataclass(kind) and kind.__module__.startswith("lora_fx."):
            held = {field.name: getattr(value, field.name) for field in fields(value)}
            known = _hints(kind, *kind.__mro__)
            inside = _odd_among(f"{kind.__name__}.", held, known) or _odd_inside(held.values())
        elif isinstance(value, Mapping):
            inside = _odd_inside(value.values())
        elif isinstance(value, list | tuple):
            inside = _odd_inside(value)
        if inside is not None:
            return inside
    return None


def _fits(value: Any, hint: Any) -> bool:
    kind: Any = get_origin(hint) or hint
    parts = get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in parts)
    if hint is Any or not isinstance(kind, type):
        return True
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    if kind is bool:
        return isinstance(value, int) or type(value).__name__.startswith("bool")  # numpy's too
    kind = {int: Integral, float: Real, Path: PathLike}.get(kind, kind)
    if not isinstance(value, kind) or (isinstance(value, str | bytes) and kind is Sequence):
        return False
    if issubclass(kind, Mapping) and parts:
        return all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    # What has no length may be read once, and has been.
    is_kept = kind is Sequence or (kind is Iterable and isinstance(value, list | tuple))
    return not is_kept or all(_fits(one, parts[0]) for one in value)
