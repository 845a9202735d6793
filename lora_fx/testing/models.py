"""Tiny nets. Ragged sizes tell axes apart; no two sizes are equal by chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Ragged(nn.Module):
    """3 -> 5 -> 7 with a bias and without, a layer called twice, and something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 5)
        self.again = nn.Linear(5, 5, bias=False)
        self.drop = nn.Dropout(0.5)
        self.narrow = nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 7)."""
        x = torch.tanh(self.wide(x))
        x = torch.tanh(self.again(x))
        x = torch.sigmoid(self.again(x))
        y: torch.Tensor = self.narrow(self.drop(x))
        return y


class Shared(nn.Module):
    """One module under two names, a function on another's weight, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 5)
        self.two = self.one
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(..., 3) -> ``out`` (..., 3) and ``tied`` (..., 5)."""
        hidden = F.relu(self.one(x)) - F.relu(self.two(2 * x))
        return {"out": F.linear(hidden, self.weight), "tied": F.linear(x, self.one.weight)}


class Outputs(nn.Module):
    """3 -> 5 -> 4 with two outputs by name, one of them read again."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)
        self.tail = nn.Sequential(nn.ReLU(), nn.Linear(5, 4, bias=False))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(..., 3) -> ``hidden`` (..., 5) and ``score`` (..., 4)."""
        hidden = self.up(x)
        return {"hidden": hidden, "score": self.tail(hidden)}


class Blocks(nn.Module):
    """3 -> 5 -> 7 -> 6 -> 4 -> 9 -> 2: numbered layers, a norm, a layer without bias, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)])
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 9, bias=False)})
        self.classifier = nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 2)."""
        x = torch.tanh(self.norm(self.fc(x)))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        output: torch.Tensor = self.classifier(torch.tanh(self.block["fc"](x)))
        return output


class Between(nn.Module):
    """A layer between two functions that are not affine."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer takes, ids or numbers, to what it gives."""
        y: torch.Tensor = self.layer(torch.sin(x) if x.is_floating_point() else x)
        return torch.tanh(y)


class Two(nn.Module):
    """Two layers with something between them that is not affine."""

    def __init__(self, wide: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.wide, self.narrow = wide, narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What ``wide`` takes to what ``narrow`` gives."""
        result: torch.Tensor = self.narrow(torch.tanh(self.wide(x)))
        return result


def two_linear() -> Two:
    """3 -> 5 -> 7, of sizes that no blocks fit."""
    return Two(nn.Linear(3, 5), nn.Linear(5, 7, bias=False))


def even_linear() -> Two:
    """8 -> 12 -> 4, for what cuts features into blocks."""
    return Two(nn.Linear(8, 12), nn.Linear(12, 4, bias=False))


def two_transposed() -> Two:
    """3 -> 5 -> 7 of transformers' Conv1D, which stores W as (in, out)."""
    from transformers import pytorch_utils

    make: Any = pytorch_utils.Conv1D
    return Two(make(5, 3), make(7, 5))


def table_and_linear() -> Two:
    """11 rows of 6, then 6 -> 7."""
    return Two(nn.Embedding(11, 6), nn.Linear(6, 7))


class Attention(nn.Module):
    """A packed projection, read whole, or in two calls where the query differs from the key."""

    def __init__(self, size: int, crossed: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(size, 2, bias=bias, batch_first=True)
        self.crossed = crossed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, size) -> the same."""
        other = torch.cos(x) if self.crossed else x
        y: torch.Tensor = self.layer(x, other, other, need_weights=False)[0]
        return y


class Experts(nn.Module):
    """A parameter that holds a matrix for each of three experts, 4 -> 6."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, ..., 4) -> (n, 3, ..., 6)."""
        return torch.matmul(x.unsqueeze(1), self.up_proj.transpose(1, 2))


class Computes(nn.Module):
    """A function of one input and of what is given by name, as a module.

    Args:
        function: from this module and x to the outputs.
        sizes: parameters of random numbers: name -> shape.
        **attributes: modules, parameters, buffers or anything else.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        sizes: Mapping[str, tuple[int, ...]] | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__()
        self.function = function
        drawn = {name: nn.Parameter(torch.randn(size)) for name, size in (sizes or {}).items()}
        for name, value in {**drawn, **attributes}.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> Any:
        """What the function says."""
        return self.function(self, x)


class Notebook(nn.Module):
    """LoRA as notebooks write it: a layer, and a delta of full size of two factors."""

    def __init__(self, into: int = 6, out: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(into, out)
        self.a, self.b = nn.Parameter(torch.randn(out, 2)), nn.Parameter(torch.randn(2, into))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., into) -> (..., out)."""
        y: torch.Tensor = self.fc(x) + 1.5 * (x @ (self.a @ self.b).T)
        return y


class Tied(nn.Module):
    """An embedding 6 x 5 whose table is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids below 6, (...) -> (..., 6)."""
        return F.linear(self.table(ids), self.table.weight)
