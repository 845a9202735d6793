"""Takes the low-rank branches away: the base again."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.branches import branches
from lora_fx.editor import Editor
from lora_fx.pass_base import Pass


@dataclass(frozen=True)
class StripLora(Pass):
    """``add(linear(x, W, b), matmul(matmul(x, A), B))  ->  linear(x, W, b)``.

    Refuses nothing: a graph without branches comes back unmodified. Tensors that an adapter
    replaced (``modules_to_save``, trained biases) stay replaced.

    Attributes:
        name: the adapter to take away; all of them by default.
    """

    name: str | None = None

    def rewrite(self, editor: Editor) -> None:
        """Makes the readers of each sum read what the branch was added to."""
        # Last first: what a later branch is added to may be an earlier branch.
        for branch in reversed(branches(editor.gm)):
            if self.name in (None, branch.name):
                editor.replace(branch.out, branch.base)
                editor.record("strip", branch.path, f"adapter {branch.name}")
