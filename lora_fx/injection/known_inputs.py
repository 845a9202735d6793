"""Inputs of adapted layers that are constant: tables of positions, learned queries.

Such a layer, and the branch beside it, are constants to whoever evaluates those; and a product of
two of them names none as its layer's. So they are hidden while they are merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.injection.branches import Branch, branches
from lora_fx.layers.layer_types import OPERATORS, operands_of


@contextmanager
def hidden_inputs(editor: Editor) -> Iterator[None]:
    """Lets layers with a branch read something unknown in the place of what is known before."""
    found = {branch: x for branch in branches(editor.gm) if (x := _read_by(branch)) is not None}
    known = _known(editor.gm, set(found.values()))
    covers: dict[fx.Node, fx.Node] = {}
    was_modified = editor.modified
    for branch, x in found.items():
        if x not in known:
            continue
        if x not in covers:
            covers[x] = editor.call(_unknown, (), before=min(x.users), like=branch.site)
            covers[x].meta["val"] = _value(editor.gm, x)
        for call in readers_between(x, branch.out):
            editor.rebind(call, x, covers[x])
    editor.modified = was_modified
    yield
    for x, cover in covers.items():
        was_modified = editor.modified
        editor.replace(cover, x)
        editor.modified = was_modified


def _unknown() -> None:
    """Stands for what is known: nobody takes a call without inputs for a constant."""


def _read_by(branch: Branch) -> fx.Node | None:
    if branch.site.target not in OPERATORS or branch.mask is not None:
        return None
    x = branch.site.args[operands_of(branch.site.target).x]
    return x if isinstance(x, fx.Node) else None


def _known(gm: fx.GraphModule, asked: set[fx.Node]) -> set[fx.Node]:
    """Those that no input of the graph has a say in."""
    told: set[fx.Node] = set()
    for node in gm.graph.nodes if asked else ():
        if node.op == "placeholder" or not told.isdisjoint(node.all_input_nodes):
            told.add(node)
    return asked - told


def _value(gm: fx.GraphModule, x: fx.Node) -> torch.Tensor | None:
    if "val" in x.meta or x.op != "get_attr":
        return x.meta.get("val")
    stored = get_unevaluated(gm, str(x.target))
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def readers_between(x: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The readers of a node that another is computed from.

    Args:
        x: the node.
        end: the other.
    """
    found, pending = {end}, [end]
    while pending:
        fresh = {n for n in pending.pop().all_input_nodes if n > x} - found
        found |= fresh
        pending += fresh
    return [user for user in x.users if user in found]
