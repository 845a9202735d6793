"""Shapes of one layer under PEFT's LoRA."""

from __future__ import annotations

import pytest
import torch

from lora_fx import AdapterError
from lora_fx.formats.peft.lora import LoraConfig, lora_tensors, read_lora
from lora_fx.testing import same_tensors

Shapes = dict[str, tuple[int, ...]]
PAIR: Shapes = {"lora_A.weight": (2, 3), "lora_B.weight": (5, 2)}
TABLE: Shapes = {"lora_embedding_A": (2, 11), "lora_embedding_B": (5, 2)}
CONV: Shapes = {"lora_A.weight": (2, 4, 3, 1), "lora_B.weight": (6, 2, 1, 1)}


def test_a_table_beside_biases_has_none() -> None:
    tensors = {leaf: torch.randn(size) for leaf, size in TABLE.items()}
    update = read_lora("fc", tensors, LoraConfig(r=2, lora_alpha=3, lora_bias=True))
    assert (update.shape, update.scale, update.bias) == ((5, 11), 1.5, None)
    same_tensors(lora_tensors(update, False), tensors)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PAIR | TABLE, "has .*, expected"),
        ({"lora_embedding_A": (2, 11)}, "half of a pair, up is missing"),
        (CONV | {"lora_B.weight": (6, 2)}, r"lora_B.weight is \(6, 2\), exp"),
        (CONV | {"lora_B.weight": (6, 2, 3, 1)}, r"is \(6, 2, 3, 1\), expected"),
        (CONV | {"lora_B.weight": (6, 3, 1, 1)}, "r = 2: the ranks differ"),
        (TABLE | {"lora_embedding_A": (3, 11)}, r"lora_embedding_A \(3, 11\) .* rank 2"),
        ({"lora_embedding_A": (2, 11, 1), "lora_embedding_B": (5, 2, 1)}, r"expected \(r, in\)"),
    ],
)
def test_shapes_that_are_of_no_layer_are_refused(shapes: Shapes, message: str) -> None:
    tensors = {leaf: torch.ones(size) for leaf, size in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        read_lora("fc", tensors, LoraConfig(r=2, lora_alpha=3))
