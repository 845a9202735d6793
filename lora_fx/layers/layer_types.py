"""How each kind of layer is computed in low rank: the calls, and how their constants are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_fx.graph.ops import aten
from lora_fx.layers.layer import Layer
from lora_fx.layers.sites import Site
from lora_fx.layers.weight_parts import Places

Call = tuple[Any, tuple[Any, ...]]
_CONVS = {
    "conv1d": aten.conv1d.default,
    "conv2d": aten.conv2d.default,
    "conv3d": aten.conv3d.default,
}
_GROUPS = 6


def shrink(site: Site, x: fx.Node, down: fx.Node) -> Call:
    """X -> r features, by the layer's own geometry."""
    if site.kind == "embedding":
        return aten.embedding.default, (down, x)
    if site.is_conv:  # its own stride, padding and dilation, over all of its inputs
        return site.node.target, (x, down, None, *site.node.args[3:_GROUPS])
    if site.labels is not None:
        return aten.einsum.default, (site.labels.shrink(), [x, down])
    return aten.matmul.default, (x, down)


def expand(site: Site, h: fx.Node, up: fx.Node, groups: int) -> Call:
    """R features -> the layer's outputs, point by point."""
    if site.labels is not None:
        return aten.einsum.default, (site.labels.expand(), [h, up])
    if not site.is_conv:
        return aten.matmul.default, (h, up)
    dims = len(site.shape) - 2
    unit = (h, up, None, [1] * dims, [0] * dims, [1] * dims, groups)
    return _CONVS[site.kind], unit if groups > 1 else unit[:3]


def down_as_stored(site: Layer, down: torch.Tensor) -> torch.Tensor:
    """(r, in, *kernel) as the layer reads it, and back: turned around, but for a convolution."""
    return down.contiguous() if site.is_conv else down.t().contiguous()


def up_as_stored(site: Layer, up: torch.Tensor) -> torch.Tensor:
    """(out, r) as the layer's expand reads it: (r, out), or (out, r, 1, ...)."""
    if not site.is_conv:
        return up.t().contiguous()
    return up.reshape(*up.shape, *[1] * (len(site.shape) - 2)).contiguous()


def up_as_update(site: Layer, up: torch.Tensor) -> torch.Tensor:
    """The reverse of `up_as_stored`."""
    return up.flatten(1).contiguous() if site.is_conv else up.t().contiguous()


def along_outputs(site: Layer, vector: torch.Tensor) -> torch.Tensor:
    """A vector of (features,) that acts on the layer's results, or on its input."""
    return vector.reshape(-1, *[1] * (len(site.shape) - 2)) if site.is_conv else vector


def pick(site: Site, factor: str) -> tuple[int, Places] | None:
    """What a call that reads a part of its weight takes of a factor or vector: axis and places.

    Args:
        site: the call.
        factor: ``"down"``, ``"up"``, ``"col"``, or another vector, along the outputs.
    """
    places = site.inputs if factor in ("down", "col") else site.outputs
    if places is None:
        return None
    axes = {"down": 1, "up": 0} if site.is_conv else {"down": 0, "up": 1}
    return axes.get(factor, 0), places


def parts_of_shrink(node: fx.Node, site: Site) -> tuple[Any, Any] | None:
    """X and down of a call of `shrink`."""
    if site.kind == "embedding" and node.target is aten.embedding.default:
        return node.args[1], node.args[0]
    if site.labels is not None:
        return _of_einsum(node, site.labels.shrink())
    is_call = node.target is (site.node.target if site.is_conv else aten.matmul.default)
    return (node.args[0], node.args[1]) if is_call else None


def parts_of_expand(node: fx.Node, site: Site) -> tuple[Any, Any] | None:
    """The r features and up of a call of `expand`."""
    if site.labels is not None:
        return _of_einsum(node, site.labels.expand())
    wanted = _CONVS[site.kind] if site.is_conv else aten.matmul.default
    return (node.args[0], node.args[1]) if node.target is wanted else None


def axes_behind(site: Site, outputs: bool = True) -> int:
    """How many axes are behind the features of a product's result, or of its input."""
    if site.labels is None:
        return 0
    return site.labels.behind if outputs else site.labels.before


def _of_einsum(node: fx.Node, equation: str) -> tuple[Any, Any] | None:
    is_call = node.target is aten.einsum.default and node.args[0] == equation
    one, other = node.args[1] if is_call else (None, None)  # type: ignore[misc]
    return (one, other) if is_call else None
