"""How much each layer changes, by layer and projection: a table whose cells have a colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_fx.report.layer_facts import LayerFacts
from lora_fx.tables import Html, element, number, table


def heat_maps(layers: Sequence[LayerFacts]) -> Html:
    """A table for each adapter: rows are layers, columns projections, cells ``‖ΔW‖ / ‖W‖``.

    Args:
        layers: those that are changed.
    """
    most = max((_known(fact.change) for fact in layers), default=0.0)
    return element(
        "div",
        *(
            _heat_map(name, [fact for fact in layers if fact.adapter == name], most)
            for name in dict.fromkeys(fact.adapter for fact in layers)
        ),
    )


def _heat_map(name: str, layers: Sequence[LayerFacts], most: float) -> Html:
    cells = {split(fact.path): fact.change for fact in layers}
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = [
        [row, *(_cell(cells.get((row, column)), most) for column in columns)]
        for row in dict.fromkeys(row for row, _ in cells)
    ]
    return table(["", *columns], rows, f"‖ΔW‖ / ‖W‖, adapter {name}")


def split(path: str) -> tuple[str, str]:
    """A path at its last number that something follows: ``layers.3``, ``mlp.up``."""
    names = path.split(".")
    places = [place for place, name in enumerate(names[:-1], 1) if name.isdigit()]
    place = max(places, default=0)
    return ".".join(names[:place]), ".".join(names[place:])


def _cell(change: float | None, most: float) -> Html | None:
    if change is None:
        return None
    share = _known(change) / most if most else 0.0
    style = f"display:block;padding:.2em .4em;background:rgba(224,118,12,{0.75 * share:.2f})"
    return element("span", number(change), style=style)


def _known(change: float | None) -> float:
    return change if change is not None and math.isfinite(change) else 0.0
