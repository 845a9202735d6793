"""The ways in which diffusers has named a layer's tensors, read as one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.pairs import ALPHA, BIAS, DOWN, MAGNITUDE, UP, Layers, add
from lora_fx.kinds import lokr

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
LOKR = lokr.MARKS
ENDINGS = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_B.bias": BIAS,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".alpha": ALPHA,
    **{f".{leaf}": leaf for leaf in sorted(LOKR)},
}
# The oldest spelling names a projection by its attention, whatever the model calls it.
_OLD = re.compile(r"\.to_(?P<which>q|k|v|out)_lora\.(?P<role>down|up)\.weight$")
_OLD_MAGNITUDE = re.compile(r"\.to_(?P<which>q|k|v|out)\.lora_magnitude_vector$")
_IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_FOREIGN = {"dora_scale": "kohya's DoRA", "hada_": "LoHa", "diff": "a full difference (LyCORIS)"}
# Names that PEFT alone would give a layer too, and the parts of a path that only diffusers has.
_PEFT_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")
_OWN_PARTS = re.compile(
    r"^(unet|transformer_2|transformer_ref|text_conditioner|connectors)\."
    r"|\.(single_)?transformer_blocks\.|\.(add_|to_)(q|k|v|out|qkv)(_proj)?\."
    r"|^text_encoder(_[23])?\."
)


def speaks_diffusers(names: Collection[str]) -> bool | None:
    """Whether tensors are named as diffusers alone names them; None where PEFT's dumps may be.

    A file of ``transformer.<path>.lora_A.weight`` and nothing else may be either's, with another
    scale each: a language model's transformer is called that too.
    """
    starts = tuple(f"{component}." for component in COMPONENTS)
    ends = tuple(ending for ending in ENDINGS if ending != ".alpha")
    named = [n for n in names if n.startswith(starts) and (n.endswith(ends) or _OLD.search(n))]
    if not named:
        return False
    is_own = any(not name.endswith(_PEFT_ENDINGS) or _OWN_PARTS.search(name) for name in named)
    return True if is_own or any(name.endswith(".alpha") for name in names) else None


def sort_by_component(tensors: Mapping[str, torch.Tensor], bare: bool = False) -> dict[str, Layers]:
    """Sorts every tensor of a file by component, layer and role.

    Args:
        tensors: by key.
        bare: the keys begin with no component's name; they are all of the component ``""``.

    Raises:
        AdapterError: a key without a use, or one of a feature that is not supported.
    """
    components: dict[str, Layers] = {}
    unused = []
    for key, tensor in tensors.items():
        component, _, rest = ("", "", key) if bare else key.partition(".")
        leaf = rest.rpartition(".")[2]
        feature = next((_FOREIGN[start] for start in _FOREIGN if leaf.startswith(start)), None)
        if feature is not None:
            raise AdapterError(f"tensor {key!r} is {feature}, which is not supported")
        found = _parsed(component, rest)
        if (component not in COMPONENTS and not bare) or found is None:
            unused.append(key)
            continue
        path, role = found
        add(components.setdefault(component, {}), path, role, key, tensor)
    if unused:
        raise AdapterError(
            f"{len(unused)} tensors have names of no known use: {shorten(unused)}; "
            f"expected one of {', '.join(COMPONENTS)}, a path, and an ending such as "
            ".lora_A.weight, .lora.down.weight or .alpha"
        )
    return components


def _parsed(component: str, rest: str) -> tuple[str, str] | None:
    """The path and the role of a key without its component."""
    rest = f".{rest}".replace(".processor.", ".").removeprefix(".")
    is_text = component.startswith("text_encoder")
    names = _IN_TEXT if is_text else _IN_UNET
    old = _OLD.search(rest)
    if old is not None:
        return f"{rest[: old.start()]}.{names[old['which']]}", DOWN if old["role"] == "down" else UP
    # Beside the oldest spelling, a magnitude is of what diffusers makes of it too.
    old = _OLD_MAGNITUDE.search(rest)
    if old is not None and (is_text or old["which"] == "out"):
        return f"{rest[: old.start()]}.{names[old['which']]}", MAGNITUDE
    ending = next((ending for ending in ENDINGS if rest.endswith(ending)), None)
    return None if ending is None else (rest.removesuffix(ending), ENDINGS[ending])
