from __future__ import annotations

from typing import Any

from lora_fx import inject, text, trace
from lora_fx.passes import StripLora
from lora_fx.testing import check_pass, make_adapter

SHAPES = {"wide": (5, 3), "again": (5, 5)}


def test_stripping_gives_the_base(ragged: Any, x: Any) -> None:
    base = trace(ragged, (x,))
    injected = inject(
        base, [make_adapter(SHAPES), make_adapter({"wide": (5, 3)}, 3, name="german")]
    )
    seen = check_pass(StripLora(), injected, x, expected=ragged(x), control=injected(x))
    assert seen.after == text(base)
    assert not check_pass(StripLora(), seen.gm, x).result.modified


def test_one_adapter_can_be_stripped_by_name(ragged: Any, x: Any) -> None:
    base = trace(ragged, (x,))
    french, german = make_adapter(SHAPES), make_adapter({"wide": (5, 3)}, 3, name="german")
    for pair in ([french, german], [german, french]):
        left = StripLora("german")(inject(base, pair)).graph_module
        assert text(left) == text(inject(base, french))
