"""Hints that readers take."""

from __future__ import annotations

from typing import Any

import pytest

from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats import load_adapter
from lora_fx.formats.hints import Hints, check_all_used, value_for


def test_the_defaults_are_the_careful_ones() -> None:
    assert Hints() == Hints(strict=True, allow_pickle=False)
    others = {k: v for k, v in vars(Hints()).items() if k not in ("strict", "allow_pickle")}
    assert not any(others.values()), "no hint says anything until it is given"


def test_the_longest_end_of_a_path_wins() -> None:
    values = {"fc": 1, "block.fc": 2, "a.block.fc": 3}
    found = [value_for(values, path) for path in ("fc", "x.fc", "x.block.fc", "a.block.fc")]
    assert found == [1, 1, 2, 3]
    for path in ("xfc", "fc.x", "FC", ""):  # an end begins after a dot
        assert value_for({"fc": 1}, path) is None


def test_a_name_that_ends_no_path_is_refused() -> None:
    check_all_used("alpha", {"fc": 1, "b.fc": 2}, ["a.b.fc"])
    with pytest.raises(AdapterError, match=r"alpha names what is no layer of the file: cf, a$"):
        check_all_used("alpha", {"fc": 1, "cf": 2, "a": 3}, ["a.b.fc"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_lora_weights", "pissa", "is 'pissa'"),
        ("rank_pattern", {"misspelt": 3}, "has keys .* misspelt"),
        ("alpha_pattern", {"misspelt": 3}, "has keys .* misspelt"),
    ],
)
def test_a_doubt_is_refused_or_warned_of_at_the_line_that_loads(
    lab: Any, field: str, value: Any, message: str
) -> None:
    directory = lab.write()
    lab.edit_config(directory, **{field: value})
    message = rf"adapter_config\.json: {field} {message}"
    with pytest.raises(AdapterError, match=f"{message}.* pass strict=False"):
        load_adapter(directory)
    with pytest.warns(AdapterWarning, match=message) as warned:
        load_adapter(directory, strict=False)
    assert [warning.filename for warning in warned] == [__file__]
