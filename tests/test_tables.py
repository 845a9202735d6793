"""Tables: what a cell holds is text, whatever it looks like."""

from __future__ import annotations

from xml.etree import ElementTree

from lora_fx.tables import Html, number, size, table

HOSTILE = "<script>alert('x')</script>\"&"


def test_every_cell_is_text_but_what_is_html() -> None:
    made = table([HOSTILE], [[HOSTILE], [Html("<b>bold</b>")]], HOSTILE)
    caption, head, first, second = ElementTree.fromstring(made)
    assert caption.text == head[0].text == first[0].text == HOSTILE
    assert second[0][0].tag == "b"
    assert "<script" not in made


def test_numbers_are_short_and_stand_on_the_right() -> None:
    made = table(["n"], [[1234567], [0.123456], [None], [True], ["1.50"]])
    cells = [row[0] for row in ElementTree.fromstring(made)][1:]
    assert [cell.text for cell in cells] == ["1,234,567", "0.123", None, "True", "1.50"]
    assert ["right" in cell.get("style", "") for cell in cells] == [True, True, False, False, False]
    assert number(1e-7) == "1e-07"


def test_only_long_text_may_be_broken() -> None:
    short, long = ElementTree.fromstring(table(["a"], [["x" * 32], ["x" * 33]]))[1:]
    assert (short[0].get("class"), long[0].get("class")) == (None, "long")


def test_sizes_have_units() -> None:
    assert [size(n) for n in (12, 1200, 3.4e6, 5e9)] == ["12 bytes", "1.2 kB", "3.4 MB", "5 GB"]
