"""One layer under PEFT's LoRA: read and written again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx import AdapterError
from lora_fx.formats.peft.lora import LoraConfig, lora_tensors, read_lora
from lora_fx.testing import same_tensors

Shapes = dict[str, tuple[int, ...]]
PAIR: Shapes = {"lora_A.weight": (2, 3), "lora_B.weight": (5, 2)}
TABLE: Shapes = {"lora_embedding_A": (2, 11), "lora_embedding_B": (5, 2)}
CONV: Shapes = {"lora_A.weight": (2, 4, 3, 1), "lora_B.weight": (6, 2, 1, 1)}
LAYERS: dict[str, tuple[Shapes, dict[str, Any], tuple[int, ...]]] = {
    "linear": (PAIR, {}, (5, 3)),
    "bias": (PAIR | {"lora_B.bias": (5,)}, {"lora_bias": True}, (5, 3)),
    "dora": (PAIR | {"lora_magnitude_vector": (5,)}, {"use_dora": True}, (5, 3)),
    "table": (TABLE, {}, (5, 11)),
    "table beside biases": (TABLE, {"lora_bias": True}, (5, 11)),
    "dora of a table": (TABLE | {"lora_magnitude_vector": (5,)}, {"use_dora": True}, (5, 11)),
    "convolution": (CONV, {}, (6, 4, 3, 1)),
    "dora of a convolution": (CONV | {"lora_magnitude_vector": (1, 6, 1, 1)}, {"use_dora": True},
     (6, 4, 3, 1)),
    "grouped": (CONV | {"lora_B.weight": (6, 1, 1, 1)}, {}, (6, 4, 3, 1)),
    "one axis": ({"lora_A.weight": (2, 4, 3), "lora_B.weight": (6, 2, 1)}, {}, (6, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_read_is_written(name: str) -> None:
    shapes, fields, shape = LAYERS[name]
    tensors = {leaf: torch.randn(size) for leaf, size in shapes.items()}
    update = read_lora("fc", tensors, LoraConfig(r=2, lora_alpha=3, **fields))
    assert (update.shape, update.scale, update.rank) == (shape, 1.5, 2)
    written = lora_tensors(update, update.bias is not None)
    same_tensors(written, tensors)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PAIR | TABLE, "has .*, expected"),
        ({"lora_embedding_A": (2, 11)}, "half of a pair, lora_embedding_B is missing"),
        (CONV | {"lora_B.weight": (6, 2)}, "are no pair"),
        (CONV | {"lora_B.weight": (6, 2, 3, 1)}, "are no pair"),
        (CONV | {"lora_B.weight": (6, 3, 1, 1)}, "should be of rank 2"),
        (TABLE | {"lora_embedding_A": (3, 11)}, r"lora_embedding_A \(3, 11\) .* rank 2"),
        ({"lora_embedding_A": (2, 11, 1), "lora_embedding_B": (5, 2, 1)}, "are no pair"),
    ],
)
def test_shapes_that_are_of_no_layer_are_refused(shapes: Shapes, message: str) -> None:
    tensors = {leaf: torch.ones(size) for leaf, size in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        read_lora("fc", tensors, LoraConfig(r=2, lora_alpha=3))
