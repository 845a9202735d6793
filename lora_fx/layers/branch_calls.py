"""What a branch takes of its factors at one call of a layer, and its calls read back."""

from __future__ import annotations

from typing import Any

from torch import fx

from lora_fx.graph.ops import aten
from lora_fx.layers.layer_types import OPERATORS, operands_of
from lora_fx.layers.sites import Site
from lora_fx.layers.weight_parts import Places


def pick(site: Site, factor: str) -> tuple[int, Places] | None:
    """What a call that reads a part of its weight takes of a factor or vector: axis and places.

    Args:
        site: the call.
        factor: ``"down"``, ``"up"``, ``"col"``, or another vector, along the outputs.
    """
    is_in = factor in ("down", "col")
    places = site.inputs if is_in else site.outputs
    if places is None:
        return None
    is_vector = factor not in ("down", "up")
    return 0 if is_vector else site.type.axis(factor, "in" if is_in else "out"), places


def parts_of_shrink(node: fx.Node, site: Site) -> tuple[Any, Any] | None:
    """X and down of a call of the layer's shrink."""
    return _parts(node, *site.type.shrink(site, site.node, site.node))


def parts_of_expand(node: fx.Node, site: Site) -> tuple[Any, Any] | None:
    """The r features and up of a call of the layer's expand."""
    return _parts(node, *site.type.expand(site, site.node, site.node, 1))


def axes_behind(site: Site, outputs: bool = True) -> int:
    """How many axes are behind the features of a product's result, or of its input."""
    if site.labels is None:
        return 0
    return site.labels.behind if outputs else site.labels.before


def _parts(node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """The two operands of a call, if it is of a target, and of the same equation."""
    if node.target is not target:
        return None
    if target is aten.einsum.default:
        if node.args[0] != arguments[0]:
            return None
        operands: Any = node.args[1]
        return operands[0], operands[1]
    places = operands_of(target) if target in OPERATORS else None
    x, factor = (places.x, places.weight) if places else (0, 1)
    return (node.args[x], node.args[factor]) if len(node.args) > 1 else None
