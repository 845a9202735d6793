from __future__ import annotations

import pytest

from lora_fx.layers.site_names import is_packed, paths_of

PATHS: list[tuple[list[tuple[str, str, str]], str]] = [
    ([("fc", "fc.weight", "fc")], "a layer"),
    ([("head", "embed.weight", "head"), ("embed", "embed.weight", "embed")], "tied"),
    ([("", "fc.weight", "fc"), ("", "w", "w")], "called by the root"),
    ([("", "fc.weight", "fc.weight"), ("fc", "fc.weight", "fc")], "called by both"),
    ([("m", "m.w", "m.w")], "a bare weight alone"),
    ([("m", "m.v", "m.v"), ("m", "m.w", "m.w")], "two bare weights"),
    ([("m", "m.fc.weight", "m.fc")], "a layer that its owner calls"),
    (
        [("a", "a.in_proj_weight", "a"), ("a", "a.out_proj.weight", "a.out_proj")],
        "attention",
    ),
    ([("a", "a.out_proj.weight", "a.out_proj")], "attention whose projection is missed"),
    (
        [("a", "a.in_proj_weight_1", "a"), ("a", "a.out_proj.weight_2", "a.out_proj")],
        "attention, folded while others read the old weights",
    ),
    (
        [("b", "a.in_proj_weight", "b"), ("b", "a.out_proj.weight", "b.out_proj")],
        "attention under another name",
    ),
    ([("m", "m.a.in_proj_weight", "m.a")], "attention that its owner calls"),
    (
        [
            ("a", "a.q_proj_weight", "a.q_proj_weight"),
            ("a", "a.k_proj_weight", "a.k_proj_weight"),
            ("a", "a.v_proj_weight", "a.v_proj_weight"),
            ("a", "a.out_proj.weight", "a.out_proj"),
        ],
        "attention of several widths",
    ),
    (
        [("b", "a.q_proj_weight", "b.q_proj_weight"), ("b", "a.out_proj.weight", "b.out_proj")],
        "the same under another name",
    ),
    ([("m", "m.e.weight_1", "m.e.weight_1"), ("m", "m.e.weight_2", "m.e.weight_2")], "numbered"),
]


@pytest.mark.parametrize(("layers", "what"), PATHS, ids=[what for _, what in PATHS])
def test_layers_are_called_by_who_holds_their_weight(
    layers: list[tuple[str, str, str]], what: str
) -> None:
    wanted = {(path, name): called for path, name, called in layers}
    assert paths_of(wanted) == wanted


def test_the_packed_projection_is_told_by_its_name() -> None:
    assert is_packed("attn.in_proj_weight")
    assert is_packed("attn.in_proj_weight_1")
    assert not is_packed("in_proj_weight")  # of the root: nothing else it could be called
    assert not is_packed("attn.in_proj_bias")
