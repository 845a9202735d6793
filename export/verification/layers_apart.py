"""Layers kept apart from what a graph computes around them: they fold with their adapters alone."""

from __future__ import annotations

from typing import TypeVar

from torch import fx

from lora_fx.graph.editor import Editor
from lora_fx.injection.branches import col_of, input_of, last_of
from lora_fx.injection.known_inputs import readers_between
from lora_fx.layers.sites import sites

_Value = TypeVar("_Value")


def layers_apart(gm: fx.GraphModule) -> fx.GraphModule:
    """``s * (linear(x, W) + branch)  ->  s * apart(linear(apart(x), W) + branch)``.

    So W' is what `merge_onnx` writes, which reads no more than the layer: neither a scale nor a
    residual is a part of it, as `FoldLora` would have it.

    Args:
        gm: the graph, with adapters or without; it is not changed.
    """
    editor = Editor(gm)
    for site in sites(editor.gm):
        x, end = input_of(site, col_of(site)), last_of(site)
        _cover(editor, x, site.node, readers_between(x, end))
        _cover(editor, end, site.node, list(end.users))
    return editor.finish()


def apart(value: _Value) -> _Value:
    """The same, of which no analysis knows that it is."""
    return value


def _cover(editor: Editor, value: fx.Node, like: fx.Node, readers: list[fx.Node]) -> None:
    if not readers:
        return
    cover = editor.call(apart, (value,), before=min(readers), like=like)
    cover.meta["val"] = value.meta.get("val")
    for reader in readers:
        editor.rebind(reader, value, cover)
