"""The heat map: a cell for each layer, by layer and projection, its colour by its number."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lora_fx.report.heat_map import heat_maps, split
from lora_fx.report.layer_facts import LayerFacts


def fact(path: str, change: float | None, adapter: str = "a") -> LayerFacts:
    return LayerFacts(path, "", adapter, "", [], None, None, change, None, [], "", None, None)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("model.layers.3.mlp.up", ("model.layers.3", "mlp.up")),
        ("down.0.attn.1.to_out.0", ("down.0.attn.1", "to_out.0")),
        ("encoder.0", ("", "encoder.0")),
        ("0", ("", "0")),
        ("head", ("", "head")),
        ("h.0.1", ("h.0", "1")),
    ],
)
def test_a_path_is_cut_at_its_last_number_that_something_follows(
    path: str, parts: tuple[str, str]
) -> None:
    assert split(path) == parts


def test_a_cell_is_as_strong_as_its_number() -> None:
    layers = [fact("l.0.q", 0.4), fact("l.0.k", 0.2), fact("l.1.q", 0.0), fact("head", None)]
    made = heat_maps(layers)
    rows = [*ElementTree.fromstring(made).iter("tr")]
    assert [cell.text for cell in rows[0]] == [None, "q", "k", "head"]
    texts = [["".join(cell.itertext()) for cell in row] for row in rows[1:]]
    assert texts == [["l.0", "0.4", "0.2", ""], ["l.1", "0", "", ""], ["", "", "", ""]]
    assert re.findall(r"rgba\(224,118,12,([\d.]+)\)", made) == ["0.75", "0.38", "0.00"]


def test_each_adapter_has_its_own_and_all_one_scale() -> None:
    made = heat_maps([fact("q", 0.1, "one"), fact("q", 0.4, "two"), fact("k", float("inf"), "two")])
    assert made.count("<table>") == 2
    assert re.findall(r"rgba\(224,118,12,([\d.]+)\)", made) == ["0.19", "0.75", "0.00"]
