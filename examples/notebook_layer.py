"""LoRA that a notebook wrote into its model by hand: folded, and made swappable.

Nothing is registered and no name is known: what the layer computes says that it is LoRA.

    python examples/notebook_layer.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import lora_fx


class MyLinear(nn.Module):
    """A linear layer with an update of two matrices, multiplied at each call."""

    def __init__(self, into: int, out: int, rank: int = 4, alpha: float = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(into, out)
        self.grow = nn.Parameter(torch.randn(out, rank) / 4)
        self.shrink = nn.Parameter(torch.randn(rank, into) / 4)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., into) -> (..., out)."""
        return self.dropout(self.linear(x) + self.scale * (x @ (self.grow @ self.shrink).T))


class MyProjection(nn.Module):
    """Query, key and value in one layer, of which the query and the value have an update."""

    def __init__(self, size: int, rank: int = 4) -> None:
        super().__init__()
        self.size = size
        self.target = nn.Linear(size, 3 * size, bias=False)
        self.down = nn.Linear(size, 2 * rank, bias=False)
        self.up = nn.Conv1d(2 * rank, 2 * size, 1, groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, size) -> (n, length, 3 size)."""
        update = self.up(self.down(x).transpose(1, 2)).transpose(1, 2)
        padded = torch.zeros(*x.shape[:-1], 3, self.size)
        padded[..., [0, 2], :] = update.unflatten(-1, (2, self.size))
        return self.target(x) + padded.flatten(-2)


def main() -> None:
    """Folds both layers, then raises the first one's update."""
    torch.manual_seed(0)
    model = nn.Sequential(MyLinear(24, 16), nn.GELU(), MyProjection(16)).eval()
    gm = lora_fx.trace(model, (torch.randn(2, 5, 24),), dynamic_shapes=({0: "batch"},))
    print(lora_fx.explain(gm))

    folded = lora_fx.fold(gm)
    print(lora_fx.text(folded))
    x = torch.randn(3, 5, 24)
    assert lora_fx.compare(folded(x), model(x)).ok
    assert lora_fx.text(folded).count("linear(") == 2, "one layer each, and nothing beside it"

    raised = lora_fx.passes.RaiseLora("mine")(gm).graph_module
    adapter = lora_fx.adapter_from(raised)
    print(adapter)
    with TemporaryDirectory() as name:
        directory = Path(name)
        lora_fx.save_adapter(adapter, directory / "mine")  # a directory of PEFT's
        lora_fx.to_onnx(raised, directory / "model.onnx", adapters="input")
        lora_fx.export_adapter(adapter, directory / "model.onnx", directory / "mine.onnx_adapter")
        session = lora_fx.Session(directory / "model.onnx")
        mine = session.run({"input": x}, adapter=directory / "mine.onnx_adapter")
        none = session.run({"input": x})
    (mine_out,), (none_out,) = mine.values(), none.values()
    assert lora_fx.compare(torch.tensor(mine_out), model(x)).ok
    assert not lora_fx.compare(torch.tensor(none_out), model(x)).ok, "the base lacks the update"
    print("folded to two layers; raised, saved for PEFT, and swapped in onnxruntime")


if __name__ == "__main__":
    main()
