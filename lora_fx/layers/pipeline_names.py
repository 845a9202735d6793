"""What kohya calls the layers of a pipeline's models: a part of it, and a path without its dots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from lora_fx.errors import AdapterError, shorten
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning
from lora_fx.layers.resolve import Names, Size, check_one
from lora_fx.layers.trainer_names import names_of

# kohya's parts of a pipeline, and what a pipeline calls the models: te3 is a T5, in some the third
# text encoder, in others the second.
HOLDERS = {
    "unet": ("unet", "transformer"), "te": ("text_encoder",), "te1": ("text_encoder",),
    "te2": ("text_encoder_2",), "te3": ("text_encoder_3", "text_encoder_2"),
    "transformer": ("transformer",), "prior_unet": ("prior",), "prior_te": ("text_encoder",),
}  # fmt: skip
# LyCORIS writes kohya's names for a pipeline, and this prefix for any other model.
LYCORIS = "lycoris"
PREFIXES = {part: f"lora_{part}_" for part in HOLDERS} | {LYCORIS: "lycoris_"}
# Beginnings of names, those of others that keep the dots of a path too -> the part.
_STARTS = {start: part for part, start in PREFIXES.items()} | {
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoders.clip_l.": "te1",
    "text_encoders.clip_g.": "te2",
    "text_encoders.t5xxl.": "te3",
}


def part_of(name: str) -> str | None:
    """The part of a pipeline that a layer's name begins with, or ``"lycoris"``."""
    return next((part for start, part in _STARTS.items() if name.startswith(start)), None)


def check_part(part: object) -> None:
    """Refuses a ``component`` that is none of kohya's parts."""
    if part not in tuple(PREFIXES):
        raise AdapterError(f"component is {part!r:.80}, expected one of {', '.join(PREFIXES)}")


def name_of(path: str, paths: Collection[str], component: str | None) -> str:
    """What kohya calls the layer at a path, which is of a component or begins with a part's name.

    That is lossy, since a path may have underscores of its own. All paths of the adapter tell one
    text encoder from the first of several.
    """
    if component is not None:
        check_part(component)
        return PREFIXES[component] + path.replace(".", "_")
    holder, _, rest = path.partition(".")
    part = next((part for part, holders in HOLDERS.items() if holder in holders), None)
    if part is None or not rest:
        raise AdapterError(
            f"{path} begins with no part of a pipeline; pass component=, one of "
            f"{', '.join(PREFIXES)}, to say what the paths are of"
        )
    is_double = part == "te" and any(other.startswith("text_encoder_") for other in paths)
    return PREFIXES["te1" if is_double else part] + rest.replace(".", "_")


def find(asked: Mapping[str, Size], base: BaseLayers) -> dict[str, Meaning]:
    """Finds the layers that each name means, whose rows it has; mostly one layer.

    Args:
        asked: name, such as ``lora_unet_mid_block_proj`` -> the size of its weight.
        base: the layers of the model, or of a pipeline whose children hold the parts.
    """
    by_holder: dict[str, dict[str, Size]] = defaultdict(dict)
    for name, size in asked.items():
        by_holder[_holder(name, base)][name] = size
    found: dict[str, Meaning] = {}
    several: dict[str, list[str]] = {}
    for holder, own in by_holder.items():
        start = f"{holder}." if holder else ""
        inner = base.under(holder) if holder else base
        names = Names.of(inner, names_of(inner))
        result = names.resolve(own)
        found |= {n: names.meanings[path].inside(start) for n, path in result.found.items()}
        several |= {name: [start + path for path in p] for name, p in result.several.items()}
    check_one(several)
    _check_found([name for name in asked if name not in found], asked, base)
    _check_apart(found)
    return found


def _holder(name: str, base: BaseLayers) -> str:
    """The child of a pipeline that a name's part is of, or "" where the whole base is meant."""
    children = {path.partition(".")[0] for path in base}
    return next((h for h in HOLDERS.get(part_of(name) or "", ()) if h in children), "")


def _check_apart(found: Mapping[str, Meaning]) -> None:
    owners: dict[str, str] = {}
    for name, meaning in found.items():
        for path in meaning.layers if meaning.is_all else ():
            if owners.setdefault(path, name) != name:
                raise AdapterError(
                    f"{owners[path]} and {name} are both of {path}; "
                    f"pass component={part_of(name)!r} to read one part"
                )


def _check_found(missing: list[str], asked: Iterable[str], base: BaseLayers) -> None:
    if not missing:
        return
    parts = sorted({part for name in asked if (part := part_of(name))})
    advice = f"; pass component= to read one part of {', '.join(parts)}" if len(parts) > 1 else ""
    raise AdapterError(
        f"{len(missing)} names mean no layer of the base: {shorten(missing)}; its layers: "
        f"{shorten(list(base)) or 'none'}{advice}"
    )
