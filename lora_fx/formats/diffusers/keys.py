"""The ways in which diffusers has named a layer's tensors, read as one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from lora_fx.formats.dialects import ALPHA, Dialect, Layers, Tensors, sort_keys
from lora_fx.formats.peft.lora import LEAVES
from lora_fx.kinds import lokr
from lora_fx.kinds.lora import DOWN, MAGNITUDE, UP

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
_PREFIX = rf"({'|'.join(COMPONENTS)})\."
# Names that PEFT alone would give a layer too.
_OF_PEFT = {f".{leaf}": role for role, leaf in LEAVES.items()}
ENDINGS = {
    **_OF_PEFT,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".alpha": ALPHA,
    **{f".{leaf}": leaf for leaf in sorted(LOKR)},
}
# The parts of a path that only diffusers has.
_OWN_PARTS = re.compile(
    r"^(unet|transformer_2|transformer_ref|text_conditioner|connectors)\."
    r"|\.(single_)?transformer_blocks\.|\.(add_|to_)(q|k|v|out|qkv)(_proj)?\."
    r"|^text_encoder(_[23])?\."
)


def _older(names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The oldest spelling names a projection by its attention, whatever the model calls it."""
    found = {}
    for which, name in names.items():
        for role in ("down", "up"):
            found[f".to_{which}_lora.{role}.weight"] = f".{name}", f".lora.{role}.weight"
        # Beside it, a magnitude is of what diffusers makes of it too.
        found[f".to_{which}.lora_magnitude_vector"] = f".{name}", ".lora_magnitude_vector"
    return found


def _dialect(prefix: str, **names: str) -> Dialect:
    return Dialect(
        ENDINGS,
        f"one of {', '.join(COMPONENTS)}, a path, and an ending such as .lora_A.weight, "
        ".lora.down.weight or .alpha",
        prefix=prefix,
        older=_older(names),
        silent="processor",
        foreign={
            r"\.dora_scale[^.]*$": "kohya's DoRA",
            r"\.hada_[^.]*$": "LoHa",
            r"\.diff[^.]*$": "a full difference (LyCORIS)",
        },
    )


MODEL = _dialect(_PREFIX, q="to_q", k="to_k", v="to_v", out="to_out.0")
TEXT = _dialect(_PREFIX, q="q_proj", k="k_proj", v="v_proj", out="out_proj")
BARE = _dialect("", q="to_q", k="to_k", v="to_v", out="to_out.0")


def has_no_component(names: Iterable[str]) -> bool:
    """Whether the keys are the paths of one model: none begins with a component's name."""
    return not any(re.match(_PREFIX, name) for name in names)


def speaks_diffusers(names: Collection[str]) -> bool | None:
    """Whether tensors are named as diffusers alone names them; None where PEFT's dumps may be.

    A file of ``transformer.<path>.lora_A.weight`` and nothing else may be either's, with another
    scale each: a language model's transformer is called that too.
    """
    if has_no_component(names) and any(name.endswith(tuple(BARE.older)) for name in names):
        return True  # of a model's attention processors, saved by itself
    split = {name: MODEL.split(name) for name in names}
    named = [name for name, found in split.items() if found is not None and found[1] != ALPHA]
    if not named:
        return False
    is_own = any(not n.endswith(tuple(_OF_PEFT)) or _OWN_PARTS.search(n) for n in named)
    return True if is_own or any(name.endswith(".alpha") for name in names) else None


def sort_by_component(tensors: Tensors, bare: bool = False) -> dict[str, Layers]:
    """Sorts every tensor of a file by component, layer and role.

    Args:
        tensors: by key.
        bare: the keys begin with no component's name; they are all of the component ``""``.
    """
    if bare:
        return {"": sort_keys(tensors, BARE)} if tensors else {}
    components: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        components.setdefault(key.partition(".")[0], {})[key] = tensor
    return {
        component: sort_keys(own, TEXT if component.startswith("text_encoder") else MODEL)
        for component, own in components.items()
    }
