"""A fold of a method that nobody registered: it was made up for this file.

`fold` proves that a region is affine, whatever it is made of. With one nonlinearity in it, it is
not, and `explain` names the place.

    python examples/unregistered_method.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import lora_fx


class Shuffled(nn.Module):
    """W x plus a Kronecker product, rolled, scaled by output, and read once more by a bottleneck.

    Args:
        size: features in and out.
        curve: applied inside of the bottleneck.
    """

    def __init__(self, size: int, curve: nn.Module) -> None:
        super().__init__()
        self.base = nn.Linear(size, size)
        self.core = nn.Parameter(torch.randn(4, 4) / 4)
        self.within = nn.Parameter(torch.randn(size // 4, size // 4) / 4)
        self.gate = nn.Parameter(torch.randn(size) / 4)
        self.shrink, self.grow = nn.Linear(size, 2), nn.Linear(2, size)
        self.curve = curve

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        mixed = (x @ torch.kron(self.core, self.within)).roll(3, -1)
        y = (self.base(x) + mixed) * (1 + torch.tanh(self.gate))
        return y + self.grow(self.curve(self.shrink(y)))


def main() -> None:
    """Folds the method, and shows why its twin does not fold."""
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    for curve in (nn.Identity(), nn.ReLU()):
        model = nn.Sequential(Shuffled(16, curve), nn.Tanh()).eval()
        gm = lora_fx.trace(model, (x,), dynamic_shapes=({0: "batch"},))
        folded = lora_fx.fold(gm)
        print(f"\nwith {curve}:\n{lora_fx.explain(gm)}\n{lora_fx.text(folded)}")
        assert lora_fx.compare(folded(x), model(x)).ok
        count = lora_fx.text(folded).count("linear(")
        assert count == (1 if isinstance(curve, nn.Identity) else 3)
        assert lora_fx.text(lora_fx.unfold(folded)) == lora_fx.text(gm), "and back, bit for bit"
        with TemporaryDirectory() as name:
            report = lora_fx.to_onnx(folded, Path(name) / "model.onnx")
            assert report.checks
            assert all(check.ok for check in report.checks)
    print("\nwithout a curve one linear layer is left of nine calls; with one, three")


if __name__ == "__main__":
    main()
