"""Gives back what was folded."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.editor import Editor
from lora_fx.ops import module_path
from lora_fx.origin import unfold
from lora_fx.pass_base import Pass


@dataclass(frozen=True)
class UnfoldLora(Pass):
    """``linear(x, W', b)  ->  `` the region that `FoldLora` found there, bit for bit.

    Nodes, their names and order, and every tensor are those that fold was given: nothing is
    computed back. Layers that were not folded stay as they are.
    """

    def rewrite(self, editor: Editor) -> None:
        """Restores every layer of the latest fold."""
        for node in unfold(editor):
            editor.record("unfold", module_path(node))
