"""How large a model may be that a config asks for: by what its directory holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lora_fx.errors import LoraFxError

# What a config makes a list of, or a loop over.
_COUNT = re.compile(r"(num|n)_\w+|\w*(layers?|depths?|labels|blocks?|experts|heads)\w*")
_MOST = 1_000_000
_FIELDS = 30_000  # more than any set of images has labels
# Stored values take four bits or more; a head or a table may not be stored at all.
_VALUES_A_BYTE, _VALUES = 8, 1 << 26
_BYTES_A_TENSOR, _TENSORS, _MOST_TENSORS = 64, 500, 200_000


def check_config(where: Path, said: object) -> None:
    """Refuses a config that asks for more of anything than a memory holds, or for code.

    Args:
        where: the file.
        said: what it holds.

    Raises:
        LoraFxError: names the field.
    """
    left: list[tuple[str, object]] = [("", said)]
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping) and len(value) > _FIELDS:
            raise LoraFxError(f"{where}: {name:.80} has {len(value)} fields, expected {_FIELDS}")
        if isinstance(value, Mapping):
            left += [(str(key), part) for key, part in value.items()]
        elif isinstance(value, list):
            left += [(name, part) for part in value]
        else:
            _check_value(where, name, value)


def _check_value(where: Path, name: str, value: object) -> None:
    if isinstance(value, int | float) and value > _MOST and _COUNT.fullmatch(name):
        raise LoraFxError(
            f"{where}: {name:.80} is {value}, expected at most {_MOST}: correct it, or download "
            "the model again"
        )
    if name.endswith("attn_implementation") and "/" in str(value):
        raise LoraFxError(
            f"{where}: {name:.80} is {value!r:.80}, code of a hub, which is not run: remove it"
        )


@contextmanager
def bounded(directory: Path) -> Iterator[None]:
    """Lets modules be made inside whose parameters are not far more than a directory holds.

    They are counted while they have no values yet, as transformers makes them.

    Raises:
        LoraFxError: they are more, or larger, than the weights can be of.
    """
    stored = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    most = min(_MOST_TENSORS, _TENSORS + stored // _BYTES_A_TENSOR)
    left = {"tensors": most, "values": _VALUES + stored * _VALUES_A_BYTE}

    def count(module: nn.Module, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return
        left["tensors"] -= 1
        left["values"] -= value.numel()
        if min(left.values()) < 0:
            raise LoraFxError(
                f"{directory}: config.json describes a larger model than the {stored} bytes there "
                f"can be of, as {name} {tuple(value.shape)} of a {type(module).__name__}: correct "
                "its sizes, or download all of the model"
            )

    hooks = [
        register(count)
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
