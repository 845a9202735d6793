"""Takes the low-rank branches away: the base again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lora_fx.graph.editor import Editor
from lora_fx.graph.example import forget_model
from lora_fx.graph.graph_module import targets
from lora_fx.graph.pass_base import Pass
from lora_fx.injection.branches import Branch, branches_of
from lora_fx.injection.injected_adapters import Held, stripped, unreplaced
from lora_fx.injection.whole_tensors import exchange
from lora_fx.layers.adapter_tensors import parametrized_weights
from lora_fx.layers.parameter_readers import tensor_of
from lora_fx.layers.sites import Site, sites


@dataclass(frozen=True)
class StripLora(Pass):
    """``add(linear(x, W, b), matmul(matmul(x, A), B))  ->  linear(x, W, b)``.

    Refuses nothing: a graph without branches comes back unmodified. Tensors that an adapter
    replaced (``modules_to_save``, trained biases) are the base's again.

    Attributes:
        name: the adapter to take away; all of them by default.
    """

    name: str | None = None

    def rewrite(self, editor: Editor) -> None:
        """Makes readers read what was there before: sums, layers' inputs, and weights."""
        before = targets(editor.gm.graph).keys()
        # Last first: what a later branch is added to may be an earlier branch.
        found = [(site, branch) for site in sites(editor.gm) for branch in branches_of(site)]
        for site, branch in reversed(found):
            if self.name in (None, branch.name):
                _strip(editor, site, branch)
        for made in reversed(parametrized_weights(editor.gm.graph)):
            if self.name in (None, made.adapter):
                editor.replace(made.operand, made.source)
                editor.record("strip", str(made.stored.target), f"adapter {made.adapter}")
        replaced: set[str] = set()
        for name, value in unreplaced(editor.gm, self.name).items():
            replaced |= _give_back(editor, name, value)
        editor.sweep()
        if not stripped(editor.gm, before - targets(editor.gm.graph).keys() - replaced):
            forget_model(editor.gm)  # it holds what was stripped, and no record says so


def _give_back(editor: Editor, name: str, value: Held) -> set[str]:
    """Makes the readers of a parameter read the base's; what they read until now."""
    if tensor_of(editor.gm, name) is None:
        return set()  # a region that read it was folded
    editor.record("strip", name, "the base's again")
    return exchange(editor, name, value)


def _strip(editor: Editor, site: Site, branch: Branch) -> None:
    if branch.out is not branch.base:
        editor.replace(branch.out, branch.base)
    if branch.col is not None:
        scaled = site.input
        x = scaled.args[0]
        assert isinstance(x, fx.Node)
        editor.rebind(site.node, scaled, x)
    editor.record("strip", branch.path, f"adapter {branch.name}")
