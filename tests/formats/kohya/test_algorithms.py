"""Which algorithm wrote a layer's tensors."""

from __future__ import annotations

import pytest
import torch

from lora_fx.formats.kohya.names import ALGORITHMS, algorithm_of, rank_of_algorithm


@pytest.mark.parametrize(
    ("leaves", "algorithm"),
    [
        ("lora_down.weight lora_up.weight", "lora"),
        ("lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale", "lora"),
        ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b alpha", "loha"),
        ("lokr_w1 lokr_w2 dora_scale", "lokr"),
        ("diff diff_b", "full"),
        ("diff_b", "full"),
        ("oft_blocks alpha", "oft"),
        ("oft_blocks rescale", "oft"),
        ("weight on_input", "ia3"),
        ("w_norm b_norm", "norm"),
        ("alpha", None),
        ("alpha dora_scale", None),
        ("hada_w1_a lora_up.weight", None),
        ("w_norm diff", None),
        ("lora_A", None),
    ],
)
def test_leaves_are_of_one_algorithm_or_none(leaves: str, algorithm: str | None) -> None:
    assert algorithm_of(leaves.split()) == algorithm
    assert algorithm is None or algorithm in ALGORITHMS


@pytest.mark.parametrize(
    ("algorithm", "shapes", "rank"),
    [
        ("lora", {"lora_down.weight": (2, 3)}, 2),
        ("loha", {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3)}, 2),
        ("lokr", {"lokr_w1": (5, 3), "lokr_w2_b": (2, 3)}, 2),
        ("lokr", {"lokr_w1_b": (2, 3), "lokr_w2": (4, 3)}, 2),
        ("lokr", {"lokr_w1": (5, 3), "lokr_w2": (4, 3)}, None),
        ("full", {"diff": (5, 3)}, None),
        ("oft", {"oft_blocks": (5, 3, 3)}, None),
    ],
)
def test_the_rank_is_what_alpha_is_divided_by(
    algorithm: str, shapes: dict[str, tuple[int, ...]], rank: int | None
) -> None:
    tensors = {leaf: torch.ones(shape) for leaf, shape in shapes.items()}
    assert rank_of_algorithm(algorithm, tensors) == rank
