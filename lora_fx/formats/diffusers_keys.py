"""The ways in which diffusers has named a layer's tensors, read as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.limits import refuse_foreign
from lora_fx.formats.pairs import ALPHA, DOWN, UP, Layers, add

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_conditioner",
    "connectors",
)
ENDINGS = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".alpha": ALPHA,
}
# The oldest spelling names a projection by its attention, whatever the model calls it.
_OLD = re.compile(r"\.to_(?P<which>q|k|v|out)_lora\.(?P<role>down|up)\.weight$")
_IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_FOREIGN_ENDING = re.compile(r"[^.]+(?:\.(?:weight|bias))?$")


def sort_by_component(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Layers]:
    """Sorts every tensor of a file by component, layer and role.

    Raises:
        AdapterError: a key without a use, or one of a feature that is not supported.
    """
    components: dict[str, Layers] = {}
    unused = []
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        ending = _FOREIGN_ENDING.search(rest)
        refuse_foreign(file, key, ending[0] if ending else "")
        found = _parsed(component, rest)
        if component not in COMPONENTS or found is None:
            unused.append(key)
            continue
        path, role = found
        add(file, components.setdefault(component, {}), path, role, key, tensor)
    if unused:
        raise AdapterError(
            f"{file}: {len(unused)} tensors have names of no known use: {shorten(unused)}; "
            f"expected one of {', '.join(COMPONENTS)}, a path, and an ending such as "
            ".lora_A.weight, .lora.down.weight or .alpha"
        )
    return components


def _parsed(component: str, rest: str) -> tuple[str, str] | None:
    """The path and the role of a key without its component."""
    rest = f".{rest}".replace(".processor.", ".").removeprefix(".")
    old = _OLD.search(rest)
    if old is not None:
        names = _IN_TEXT if component.startswith("text_encoder") else _IN_UNET
        return f"{rest[: old.start()]}.{names[old['which']]}", DOWN if old["role"] == "down" else UP
    ending = next((ending for ending in ENDINGS if rest.endswith(ending)), None)
    return None if ending is None else (rest.removesuffix(ending), ENDINGS[ending])
