"""Plain values, as JSON has them, read back into the dataclasses that they were written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lora_fx.errors import LoraFxError

T = TypeVar("T")


def read_record(kind: type[T], value: Any, error: type[LoraFxError] = LoraFxError) -> T:
    """Makes a dataclass of what ``asdict`` gave; what it has no field for is passed over.

    Args:
        kind: the dataclass.
        value: plain values; a number that JSON cannot hold by its name.
        error: what is raised.

    Raises:
        LoraFxError: a field is missing, or holds something of another type; says which.
    """

    def refuse(where: str, found: Any, wanted: str) -> Any:
        raise error(f"{where or 'it'} is {found!r:.80}, expected {wanted}")

    made: T = _read(kind, value, "", refuse)
    return made


def _read(kind: Any, value: Any, where: str, refuse: Callable[[str, Any, str], Any]) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType or NoneType in inner:
        kinds = [one for one in inner if one is not NoneType]
        return None if value is None else _read(kinds[0], value, where, refuse)
    if origin is list and isinstance(value, list):
        return [_read(inner[0], v, f"{where}[{n}]", refuse) for n, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(inner[1], v, f"{where}[{key!r}]", refuse) for key, v in value.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        types = get_type_hints(kind)
        given: dict[str, Any] = {}
        for item in fields(kind):
            at = f"{where}.{item.name}".removeprefix(".")
            if item.name in value:
                given[item.name] = _read(types[item.name], value[item.name], at, refuse)
            elif item.default is MISSING and item.default_factory is MISSING:
                refuse(at, "missing", f"a value of {kind.__name__}")
        return kind(**given)
    if origin is Literal:
        is_one = any(type(value) is type(one) and value == one for one in inner)
        return value if is_one else refuse(where, value, f"one of {', '.join(map(str, inner))}")
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _number(value, where, refuse)
    if isinstance(kind, type) and type(value) is kind:
        return value
    return refuse(where, value, getattr(kind, "__name__", str(kind)))


def _number(value: float | str, where: str, refuse: Callable[[str, Any, str], Any]) -> Any:
    if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
        return refuse(where, value, "a number")
    try:
        return float(value)
    except OverflowError:
        return refuse(where, value, "a number")
