from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fx import text, trace


def test_calls_are_numbered_by_operator_and_tensors_shown_by_name(ragged: Any) -> None:
    assert text(trace(ragged)) == (
        "x = input()\n"
        "linear = linear(x, wide.weight, wide.bias)\n"
        "tanh = tanh(linear)\n"
        "linear_1 = linear(tanh, again.weight)\n"
        "tanh_1 = tanh(linear_1)\n"
        "linear_2 = linear(tanh_1, again.weight)\n"
        "sigmoid = sigmoid(linear_2)\n"
        "dropout = drop(sigmoid)\n"
        "linear_3 = linear(dropout, narrow.weight)\n"
        "return linear_3"
    )


def test_structures_and_keywords_are_shown() -> None:
    class Structured(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"sum": torch.cat([x, x], dim=-1), "pair": (x * 0.5, [x])}

    assert text(trace(Structured())) == (
        "x = input()\n"
        "cat = cat([x, x], dim=-1)\n"
        "mul = mul(x, 0.5)\n"
        "return {sum: cat, pair: [mul, [x]]}"
    )
