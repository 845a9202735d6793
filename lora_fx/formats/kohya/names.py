"""kohya's layer names, in which every dot became an underscore, and how they are told apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.dialects import Dialect
from lora_fx.formats.kohya.algorithms import FOREIGN, LEAVES, ROLES
from lora_fx.layers.layer import Layer

# kohya's parts of a pipeline, and what a pipeline calls the models: te3 is a T5, in some the third
# text encoder, in others the second.
HOLDERS = {
    "unet": ("unet", "transformer"),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3", "text_encoder_2"),
}
# LyCORIS writes kohya's names for a pipeline, and this prefix for any other model.
LYCORIS = "lycoris"
PREFIXES = {part: f"lora_{part}_" for part in HOLDERS} | {LYCORIS: "lycoris_"}
DIALECT = Dialect(
    {f".{leaf}": leaf for leaf in sorted(LEAVES)},
    f"{' or '.join(PREFIXES.values())}<path> and then .{', .'.join(ROLES)}, .alpha, or what "
    "LyCORIS writes",
    prefix=f"(?={'|'.join(PREFIXES.values())})",  # a name keeps it
    is_flat=True,
    foreign=FOREIGN,
)


def part_of(name: str) -> str | None:
    """The part of a pipeline that a layer's name begins with, or ``"lycoris"``."""
    return next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)


def check_part(part: object) -> None:
    """Refuses a ``component`` that is none of kohya's parts.

    Raises:
        AdapterError: names it, and those that there are.
    """
    if part not in tuple(PREFIXES):
        raise AdapterError(f"component is {part!r:.80}, expected one of {', '.join(PREFIXES)}")


def flat(path: str) -> str:
    """A path as kohya writes it: lossy, since a name may have underscores of its own."""
    return path.replace(".", "_")


def name_of(path: str, paths: Collection[str], component: str | None) -> str:
    """What kohya calls the layer at a path.

    Args:
        path: of the layer.
        paths: of all layers of the adapter: they tell one text encoder from the first of several.
        component: what the paths are of; None where each begins with a part's name in a pipeline.

    Raises:
        AdapterError: the path begins with no part's name, or the component is none.
    """
    if component is not None:
        check_part(component)
        return PREFIXES[component] + flat(path)
    holder, _, rest = path.partition(".")
    part = next((part for part, holders in HOLDERS.items() if holder in holders), None)
    if part is None or not rest:
        raise AdapterError(
            f"{path} begins with no part of a pipeline; pass component=, one of "
            f"{', '.join(PREFIXES)}, to say what the paths are of"
        )
    is_double = part == "te" and any(other.startswith("text_encoder_") for other in paths)
    return PREFIXES["te1" if is_double else part] + flat(rest)


def resolve(names: Iterable[str], base: Mapping[str, Layer]) -> dict[str, str]:
    """Finds the layer that each name means.

    Args:
        names: such as ``lora_unet_mid_block_proj``.
        base: the layers of the model, or of a pipeline whose children hold the parts.

    Returns:
        name -> path.

    Raises:
        AdapterError: a name means no layer, or several, or one that no adapter acts on, or two
            names mean one layer.
    """
    index = defaultdict(list)
    for path in base:
        index[flat(path)].append(path)
    found = {name: _candidates(name, index) for name in names}
    _check_found(found, base)
    owners: dict[str, str] = {}
    for name, (path,) in found.items():
        if not base[path].in_files:
            raise AdapterError(
                f"{name} is of {path}, a {base[path].name}; linear, embedding, convolution "
                "and norm layers are supported"
            )
        if owners.setdefault(path, name) != name:
            raise AdapterError(
                f"{owners[path]} and {name} are both of {path}; "
                f"pass component={part_of(name)!r} to read one part"
            )
    return {name: path for name, (path,) in found.items()}


def _candidates(name: str, index: Mapping[str, list[str]]) -> list[str]:
    part = part_of(name)
    if part is None:
        return []
    rest = name.removeprefix(PREFIXES[part])
    inside = [
        path
        for holder in HOLDERS.get(part, ())
        for path in index.get(f"{holder}_{rest}", [])
        if path.startswith(f"{holder}.")
    ]
    if part == "te3":
        inside = inside[:1]  # the second encoder is the T5 only where there is no third
    return inside + index.get(rest, [])


def _check_found(found: Mapping[str, list[str]], base: Mapping[str, Layer]) -> None:
    several = [f"{name} ({' or '.join(paths)})" for name, paths in found.items() if len(paths) > 1]
    if several:
        raise AdapterError(
            f"names that mean several layers of the base: {shorten(several)}; rename one "
            "of the layers, or convert the file where it was made"
        )
    missing = [name for name, paths in found.items() if not paths]
    if not missing:
        return
    parts = sorted({part for name in found if (part := part_of(name))})
    advice = f"; pass component= to read one part of {', '.join(parts)}" if len(parts) > 1 else ""
    raise AdapterError(
        f"{len(missing)} names mean no layer of the base: {shorten(missing)}; its layers: "
        f"{shorten(list(base)) or 'none'}{advice}"
    )
