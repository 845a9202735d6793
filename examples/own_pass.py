"""A pass of one's own: prune the base below an adapter, whose factors stay as they are.

A pass is a class with one method, which rewrites through an `Editor`. `check_pass` holds it to what
every pass must keep: the graph that went in, the model's tensors, the numbers.

    python examples/own_pass.py
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import lora_fx
from lora_fx.passes import Editor, Pass, Pipeline, sites
from lora_fx.testing import check_pass, make_adapter


def pruned(weight: torch.Tensor, keep: float) -> torch.Tensor:
    """A weight with its smallest numbers at zero: (out, in) -> (out, in)."""
    count = int(weight.numel() * (1 - keep))
    limit = weight.abs().flatten().kthvalue(max(count, 1)).values
    return torch.where(weight.abs() > limit, weight, 0)


@dataclass(frozen=True)
class PruneBase(Pass):
    """``linear(x, W, b)  ->  linear(x, W with its smallest numbers at zero, b)``.

    Attributes:
        keep: the part of each weight that stays.
    """

    keep: float = 0.5

    def rewrite(self, editor: Editor) -> None:
        """Makes each linear layer read a new constant; the model's own weight stays."""
        for site in sites(editor.gm):
            weight = editor.tensor(site.weight)
            if site.kind != "linear" or (weight == 0).float().mean() >= 1 - self.keep:
                continue  # pruned before: a second run has nothing to do
            name = f"{site.weight.target}_pruned"
            new = editor.constant(name, pruned(weight.detach(), self.keep), site.node)
            editor.rebind(site.node, site.weight, new)
            editor.record("prune", site.path, f"keeps {self.keep:.0%}")


def main() -> None:
    """Runs the pass through the harness, then in a pipeline before a fold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    adapter = make_adapter({"0": (8, 6), "2": (4, 8)})
    gm = lora_fx.inject(lora_fx.trace(model, (torch.randn(4, 6),)), adapter)

    smaller = copy.deepcopy(model)
    for layer in (smaller[0], smaller[2]):
        layer.weight.data = pruned(layer.weight.data, 0.5)
    expected = lora_fx.inject(lora_fx.trace(smaller), adapter)

    x = torch.randn(4, 6)
    seen = check_pass(PruneBase(), gm, x, expected=expected(x), control=gm(x))
    print(seen.after, *seen.result.edits, sep="\n")
    assert [str(edit) for edit in seen.result.edits] == ["prune 0: keeps 50%", "prune 2: keeps 50%"]

    result = Pipeline([PruneBase(), lora_fx.passes.FoldLora()])(gm)
    print(lora_fx.text(result.graph_module), *result.edits, sep="\n")
    assert lora_fx.compare(result.graph_module(x), expected(x)).ok


if __name__ == "__main__":
    main()
