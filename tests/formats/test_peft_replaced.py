"""Which keys of a PEFT file are of modules stored whole."""

from __future__ import annotations

import pytest

from lora_fx.formats.peft_replaced import saved_module


@pytest.mark.parametrize(
    ("path", "modules", "expected"),
    [
        ("head", ["head"], "head"),
        ("model.head.dense", ["head"], "model.head"),
        ("lm_head", ["head"], "lm_head"),
        ("headless", ["head"], None),
        ("a.b.c", ["a.b", "c"], "a.b"),
        ("fc", [], None),
    ],
)
def test_saved_modules_are_matched_as_peft_does(
    path: str, modules: list[str], expected: str | None
) -> None:
    assert saved_module(path, modules) == expected
