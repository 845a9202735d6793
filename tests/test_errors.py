from __future__ import annotations

from lora_fx.errors import shorten


def test_up_to_ten_names_are_shown_whole() -> None:
    names = [f"n{i}" for i in range(12)]
    assert shorten(names[:2]) == "n0, n1"
    assert shorten(names[:10]).endswith("n8, n9")
    assert shorten(names).endswith("n9, and 2 more")
    assert shorten([]) == ""
