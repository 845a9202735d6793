"""What goes through complex numbers: circulant matrices, by the spectrum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx.testing import check_case, check_reason


def blocks(m: Any, x: torch.Tensor) -> torch.Tensor:
    """C3A: each block of an output is a sum of circular convolutions."""
    kernel = torch.fft.fft(m.blocks.reshape(4, 2, 3))
    spectrum = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(m.split(x)), kernel)
    return torch.fft.fft(spectrum).real


CASES: dict[str, tuple[Any, ...]] = {
    "blocks of circulants": (blocks, "batch", "export"),
    "one circulant": (
        lambda m, x: torch.fft.irfft(
            torch.einsum("...b,b->...b", torch.fft.rfft(m.wide(x)), torch.fft.rfft(m.b6)), n=6
        ),
        "batch",
        "export",
    ),
    "scaled and along the outer axis": (
        lambda m, x: (torch.fft.fft(m.split(x), dim=-2) * 3).real,
        "batch",
        "export",
    ),
}
OPAQUE: dict[str, tuple[Any, ...]] = {
    "along the batch": (lambda m, x: torch.fft.fft(m.low(x), dim=-2).real, "batch", "spectrum"),
    "by the axis from the front": (
        lambda m, x: torch.fft.fft(m.low(x), dim=1).real,
        "batch",
        "spectrum",
    ),
    "the length of each": (
        lambda m, x: (torch.fft.fft(m.low(x)) * torch.fft.fft(m.low(x))).real,
        "batch",
        "spectrum",
    ),
    "a mixed batch": (
        lambda m, x: torch.einsum("abn,mn->bam", torch.fft.fft(m.low(x)), torch.fft.fft(m.v)).real,
        "batch",
        "spectrum",
    ),
    "along the axis behind": (
        lambda m, x: torch.fft.fft(m.low(x).transpose(-1, -2)).real,
        "batch",
        "spectrum",
    ),
    "factors of each row": (
        lambda m, x: (
            torch.einsum(
                "...b,...b->...b", torch.fft.fft(x @ m.square), torch.fft.fft(m.blocks[0])
            ).real
        ),
        "flat",
        "spectrum",
    ),
    "of an activation": (lambda m, x: torch.fft.fft(torch.sin(x)).real, "batch", "spectrum"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_comes_back_is_a_real_matrix(name: str) -> None:
    check_case(CASES[name], "export")


@pytest.mark.parametrize("name", OPAQUE)
def test_another_spectrum_says_why(name: str) -> None:
    check_reason(OPAQUE[name], "export")
