"""The tensors that kohya's scripts and LyCORIS write for one layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from lora_fx.formats.layer_tensors import ALPHA, DOWN, UP
from lora_fx.kinds import KINDS

DOWN_KEY, UP_KEY, MID, DORA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"
UP_BIAS = "lora_up.bias"  # which Black Forest Labs have, and kohya has not
ROLES = {DOWN_KEY: DOWN, UP_KEY: UP}
_DIFFERENCES = frozenset({"diff", "diff_b"})
# What LyCORIS' other algorithms write, by `lora_fx.kinds`; its (IA)3 and norms are of its own.
_OF_KINDS = {
    "loha": KINDS["loha"].leaves,
    "lokr": KINDS["lokr"].leaves,
    "full": _DIFFERENCES,
    "oft": frozenset({"oft_blocks", "rescale", ALPHA}),
}
ALGORITHMS: Mapping[str, frozenset[str]] = {
    "lora": frozenset({DOWN_KEY, UP_KEY, UP_BIAS, MID, DORA, ALPHA}),
    **_OF_KINDS,
    "ia3": frozenset({"weight", "on_input"}),
    "norm": frozenset({"w_norm", "b_norm"}),
}
LEAVES = frozenset().union(*ALGORITHMS.values())
# Ends of keys that are known and not supported.
FOREIGN = {
    r"\.(a1|a2|b1|b2|bm)\.": "GLoRA",
    r"\.(lambda_layer|[pq]_layer\.)": "T-LoRA",
    r"\.scalar": "a scaled update (LyCORIS)",
    r"\.boft_": "BOFT",
    r"\.vera_": "VeRA",
    r"\.lora_magnitude_vector": "PEFT's DoRA",
}


def algorithm_of(leaves: Collection[str]) -> str | None:
    """Which algorithm wrote these leaves; None if no single one writes them all."""
    names = frozenset(leaves)
    found = (name for name, own in ALGORITHMS.items() if names <= own and names - {ALPHA, DORA})
    return next(found, None)


def by_algorithm(leaves: Collection[str]) -> list[frozenset[str]]:
    """The leaves of one layer, apart where a full difference stands beside another algorithm."""
    names = frozenset(leaves)
    beside = names & _DIFFERENCES
    if not beside or algorithm_of(names) is not None:
        return [names]
    rest = names - beside
    return [rest, beside] if rest - {ALPHA} else [beside]


def rank_of_algorithm(algorithm: str, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """What LyCORIS divides alpha by, or None where it has no scale.

    LoKr has none where both of its factors are full. Source: ``lycoris/modules`` of 4.1.3.
    """
    leaves = {
        "lora": (DOWN_KEY,),
        "loha": ("hada_w1_b",),
        "lokr": ("lokr_w1_b", "lokr_w2_b"),
    }.get(algorithm, ())
    found = (tensors[leaf] for leaf in leaves if leaf in tensors)
    return next((len(tensor) for tensor in found if tensor.ndim > 0), None)
