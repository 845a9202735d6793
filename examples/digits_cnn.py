"""A CNN with batch-norm that reads digits, and a LoRA on its convolutions that reads turned ones.

The base is trained on scikit-learn's digits. The adapter, made and trained here without PEFT, sees
them turned by a quarter. It is exported merged, and as a file for a swappable base.

    python examples/digits_cnn.py        # needs scikit-learn
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lora_fx


def network() -> nn.Sequential:
    """Two convolutions with batch-norm and a linear layer, (n, 1, 8, 8) -> (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def fit(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Trains whatever takes gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def main() -> None:
    """Trains base and adapter, exports both ways, and counts what is read right."""
    torch.manual_seed(0)
    pixels, numbers = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(numbers)
    seen, unseen = slice(0, 1400), slice(1400, None)
    turned = images.rot90(1, (-2, -1))

    base = network()
    fit(base, images[seen], labels[seen], epochs=4)
    base.eval()

    gm = lora_fx.trace(base, (images[:4],), dynamic_shapes=({0: "batch"},))
    # "all-linear", the default, would leave the convolutions out: they are named.
    config = lora_fx.LoraConfig(r=4, alpha=8, target_modules=["0", "4", "8"], name="turned")
    tuned = lora_fx.inject(gm, config)  # in eval mode: batch-norm keeps its statistics
    fit(tuned, turned[seen], labels[seen], epochs=16)
    adapter = lora_fx.adapter_from(tuned)
    print(adapter)

    with TemporaryDirectory() as name:
        directory = Path(name)
        merged = lora_fx.to_onnx(lora_fx.fold(tuned), directory / "merged.onnx")
        slots = list(adapter.updates)
        swappable = lora_fx.to_onnx(gm, directory / "base.onnx", adapters="input", slots=slots)
        file = directory / "turned.onnx_adapter"
        lora_fx.export_adapter(adapter, directory / "base.onnx", file)

        def right(model: str, images: torch.Tensor, adapter: Path | None = None) -> float:
            session = lora_fx.Session(directory / model)
            (logits,) = session.run({"input": images[unseen]}, adapter).values()
            return float((logits.argmax(-1) == labels[unseen].numpy()).mean())

        before, after = right("base.onnx", turned), right("merged.onnx", turned)
        swapped, own = right("base.onnx", turned, file), right("base.onnx", images)
    print(f"upright  base {own:.1%}")
    print(f"turned   base {before:.1%}, merged {after:.1%}, swapped {swapped:.1%}")
    assert merged.mode == "merged"
    assert swappable.mode == "swappable"
    assert own > 0.9
    assert before < 0.5, "the base cannot read turned digits"
    assert after == swapped > 0.85


if __name__ == "__main__":
    main()
