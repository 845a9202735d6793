"""Complex numbers that a model picks, writes, pads and multiplies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import Adapter, Session, Update, compare, fold, inject, to_onnx, trace


def operator(model: Complex, x: torch.Tensor) -> torch.Tensor:
    """As a Fourier neural operator: the low frequencies are mixed, and written into zeros."""
    spectrum = torch.fft.rfft(x)
    mixed = torch.zeros(len(x), 5, x.shape[-1] // 2 + 1, dtype=torch.cfloat)
    mixed[:, :, :3] = torch.einsum("bix,iox->box", spectrum[:, :, :3], model.spectral)
    return torch.fft.irfft(mixed, n=x.shape[-1])


def modes(model: Complex, x: torch.Tensor) -> torch.Tensor:
    """As FEDformer: one frequency after the other."""
    spectrum = torch.fft.rfft(x)
    mixed = torch.zeros(len(x), 5, x.shape[-1] // 2 + 1, dtype=torch.cfloat)
    for place, mode in enumerate((0, 3)):
        weight = model.spectral[:, :, place]
        mixed[:, :, place] = torch.einsum("bi,io->bo", spectrum[:, :, mode], weight)
    return torch.fft.irfft(mixed, n=x.shape[-1])


def moved(model: Complex, x: torch.Tensor) -> torch.Tensor:
    """Padded as a Demucs does, and all else that moves."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    z = F.pad(z, (0, 1, 2, 0))[:, torch.tensor([1, 3, 0, 4])]
    z = z.unsqueeze(-2).expand(-1, -1, 2, -1)
    return torch.view_as_real(z.select(-2, 1) @ z.select(2, 0).transpose(1, 2)).flatten(2)


class Complex(nn.Module):
    def __init__(self, way: Callable[[Complex, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(6, 10), way
        self.spectral = nn.Parameter(torch.randn(3, 5, 3, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self, self.fc(x))


@torch.no_grad()
@pytest.mark.parametrize("way", [operator, modes, moved])
def test_complex_numbers_are_written_as_pairs(
    way: Callable[[Complex, torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Complex(way).eval(), torch.randn(4, 3, 6)
    gm = trace(model, (x[:2],), dynamic_shapes=({0: "batch"},))
    tuned = inject(gm, Adapter("a", {"fc": Update(torch.randn(2, 6), torch.randn(10, 2), 1.5)}))
    for graph in (tuned, fold(tuned)):
        to_onnx(graph, tmp_path / "m.onnx", force=True)
        (found,) = Session(tmp_path / "m.onnx").run({"x": x}).values()
        assert compare(found, tuned(x)).ok
        assert not compare(found, model(x)).ok
