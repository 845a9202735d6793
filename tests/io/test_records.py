"""Plain values back into dataclasses: what was written is read, all else is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from lora_fx.errors import ExportError
from lora_fx.io.records import read_record


@dataclass(frozen=True)
class Inner:
    far: float
    name: str


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool
    inner: Inner | None
    many: list[Inner]
    sizes: dict[str, int]
    later: list[str] = field(default_factory=list)


VALUE = Outer(3, True, Inner(0.5, "a"), [Inner(float("inf"), "b")], {"x": 1}, ["y"])


def plain(value: Outer = VALUE) -> Any:
    return json.loads(json.dumps(asdict(value)).replace("Infinity", '"inf"'))


def test_what_was_written_is_read() -> None:
    assert read_record(Outer, plain()) == VALUE
    assert read_record(Outer, plain(Outer(1, False, None, [], {}))) == Outer(1, False, None, [], {})


def test_a_field_with_a_default_may_be_missing_and_an_unknown_one_there() -> None:
    given = plain() | {"verified": True}
    del given["later"]
    assert read_record(Outer, given) == Outer(3, True, VALUE.inner, VALUE.many, {"x": 1})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": "3"}, "count is '3', expected int"),
        ({"count": True}, "count is True, expected int"),
        ({"flag": 1}, "flag is 1, expected bool"),
        ({"inner": []}, "inner is \\[\\], expected Inner"),
        ({"inner": {"far": 1}}, "inner.name is 'missing', expected a value of Inner"),
        ({"many": [{"far": "much", "name": ""}]}, "many\\[0\\].far is 'much', expected a number"),
        ({"many": [{"far": True, "name": ""}]}, "many\\[0\\].far is True"),
        ({"sizes": {"x": 1.5}}, "sizes\\['x'\\] is 1.5, expected int"),
        ({"sizes": None}, "sizes is None"),
        ({"later": {"a": 1}}, "later is"),
    ],
)
def test_anything_else_is_refused_by_name(change: Any, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        read_record(Outer, plain() | change, ExportError)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ExportError, match="it is \\[\\], expected Outer"):
        read_record(Outer, [], ExportError)
