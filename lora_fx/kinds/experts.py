"""LoRA of a parameter of many experts, each with two factors of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import WeightUpdate, added_to_each
from lora_fx.adapters.parameter_updates import DOWN, TURNED_EXPERTS, UP
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.errors import AdapterError, within
from lora_fx.kinds import lora
from lora_fx.kinds.lora import Roles
from lora_fx.kinds.validation import measure
from lora_fx.numerics import widened


def apart(module: str, roles: Roles) -> Iterator[tuple[str, Roles]]:
    """The pair of a module, or of each of its experts, by the paths that transformers has.

    Source: ``LoRASwitchLinear`` of mlx-lm 0.32, the layer of ``<module>.experts``.

    Args:
        module: such as ``mlp.switch_mlp.up_proj``, of which ``mlp.experts.0.up_proj`` is one.
        roles: down (experts, r, in) and up (experts, out, r); or of one pair, as it is returned.

    Raises:
        AdapterError: the tensors are of another shape.
    """
    if all(tensor.ndim < 3 for _, tensor in roles.values()):
        yield module, roles
        return
    axes = {lora.DOWN: ("experts", "r", "in"), lora.UP: ("experts", "out", "r")}
    with within(module):
        sizes = measure({role: tensor for role, (_, tensor) in roles.items()}, axes)
    owner, _, leaf = module.rpartition(".")
    for at in range(sizes["experts"]):
        own = {role: (key, tensor[at].T) for role, (key, tensor) in roles.items()}
        yield f"{owner.rpartition('.')[0]}.experts.{at}.{leaf}".removeprefix("."), own


def read(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]
) -> WeightUpdate:
    """Reads ``W[e] + scale * up[e] @ down[e]`` for every expert e, W as the layer stores it.

    Source: ``ParamWrapper`` of PEFT 0.21. `lora_fx.adapters.parameter_updates.of_experts` is the
    reverse.

    Args:
        tensors: ``lora_A.weight`` (r * experts, in), the experts one after the other, and
            ``lora_B.weight`` (out, r * experts), their columns of one rank next to each other.
        shape: of the parameter, (experts, out, in), or (experts, in, out) if it is transposed.
        settings: its name as ``parameter``, ``r``, ``scale``, ``use_rslora`` and ``transposed``.

    Raises:
        AdapterError: the tensors are of another shape.
    """
    rank, transposed = settings["r"], settings[TURNED_EXPERTS]
    count, rows, columns = shape
    out, into = (columns, rows) if transposed else (rows, columns)
    expected = (rank * count, into), (out, rank * count)
    found = tuple(tensors[DOWN].shape), tuple(tensors[UP].shape)
    if found != expected:
        raise AdapterError(
            f"lora_A and lora_B are {found}, expected {expected} for rank {rank} and "
            f"{settings['parameter']} {shape}"
        )
    down = widened(tensors[DOWN]).reshape(count, rank, into)
    up = tensors[UP].to(down.dtype).reshape(out, rank, count).permute(2, 0, 1) * settings["scale"]
    left, right = (down.mT, up.mT) if transposed else (up, down)
    kind, stored = "rslora" if settings["use_rslora"] else "lora", SourceRecord(tensors, settings)
    return WeightUpdate(kind, added_to_each(left.contiguous(), right.contiguous()), shape, stored)
