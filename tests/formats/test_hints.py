"""Hints that readers take."""

from __future__ import annotations

from lora_fx.formats.hints import Hints


def test_the_defaults_are_the_careful_ones() -> None:
    assert Hints() == Hints(strict=True, allow_pickle=False)
    others = {k: v for k, v in vars(Hints()).items() if k not in ("strict", "allow_pickle")}
    assert not any(others.values()), "no hint says anything until it is given"
