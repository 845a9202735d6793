"""Gives back what was folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from lora_fx.errors import PassError
from lora_fx.graph.editor import FOLDED, Editor, Origin, origins
from lora_fx.graph.ops import module_path
from lora_fx.graph.pass_base import Pass


@dataclass(frozen=True)
class UnfoldLora(Pass):
    """``linear(x, W', b)``  ->  the region that `FoldLora` found there, bit for bit.

    Nodes, their names and order, and every tensor are those that fold was given: nothing is
    computed back. Layers that were not folded stay as they are.

    Refuses a graph from which something that a region reads has been removed since.
    """

    def rewrite(self, editor: Editor) -> None:
        """Restores every layer of the latest fold."""
        for node in _unfold(editor):
            editor.record("unfold", module_path(node))


def _unfold(editor: Editor) -> list[fx.Node]:
    """Gives back every region of the latest fold, node for node, where it stood.

    Returns:
        The nodes that stood for the regions.

    Raises:
        PassError: a node that a region reads has been removed since.
    """
    latest = max(origins(editor.gm), key=lambda origin: origin.generation, default=None)
    if latest is None:
        return []
    nodes = list(editor.gm.graph.nodes)
    folded = {n: n.meta[FOLDED][1] for n in nodes if n.meta.get(FOLDED, (None,))[0] is latest}
    here = {n.name: n for n in nodes if n not in folded and n.name not in latest.swept}
    _restore(editor, latest, _region(latest, set(folded.values())), here)
    for node, name in folded.items():
        editor.replace(node, here[name])
    return list(folded)


def _region(origin: Origin, ends: set[str]) -> set[str]:
    """Names of the swept nodes that the ends are computed from."""
    needed = set(ends)
    for node in reversed(origin.gm.graph.nodes):
        if node.name in needed:
            needed.update(n.name for n in node.all_input_nodes if n.name in origin.swept)
    return needed


def _restore(editor: Editor, origin: Origin, region: set[str], here: dict[str, fx.Node]) -> None:
    behind: fx.Node | None = None
    for node in origin.gm.graph.nodes:
        if node.name in region:
            gone = [n.name for n in node.all_input_nodes if n.name not in here]
            if gone or behind is None:
                raise PassError(
                    f"cannot unfold {node.name}: {gone} was removed from the graph after the fold"
                )
            args = _lookup(here)
            here[node.name] = editor.insert(node, origin.gm, after=behind, args=args)
        behind = here.get(node.name, behind)


def _lookup(here: dict[str, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: here[node.name]
