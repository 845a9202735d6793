"""PEFT's wrappers: where a file's paths belong, what is read of experts, and the way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fx.adapters.parameter_updates import DOWN, TURNED_EXPERTS, UP, name_of
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError
from lora_fx.formats.dialects import Tensors
from lora_fx.graph.wrappers import PEFT_LAYER
from lora_fx.kinds import experts
from lora_fx.layers.base_layers import BaseLayers

WRAPPED = PEFT_LAYER


@dataclass(frozen=True)
class WrappedTarget:
    """What the tensors under one path of a file act on.

    Attributes:
        path: of the update: of the module, or of a parameter that is no module's ``weight``.
        asked: what the patterns are asked about.
        parameter: the name of the parameter, under ``target_parameters``.
        depth: how many wrappers of the same module are around this one.
        shape: of the parameter, as the base stores it; None where nobody gave the base.
    """

    path: str
    asked: str
    parameter: str | None = None
    depth: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def settings(self) -> dict[str, object]:
        """What an update of a parameter keeps of its place."""
        return {"parameter": self.parameter, "depth": self.depth}


@dataclass(frozen=True)
class Home:
    """Where an update is kept.

    Attributes:
        key: the path in the file.
        asked: what the patterns name; "" where the layer has the rank of the one around it.
        parameter: the name in target_parameters, or None where target_modules names the module.
    """

    key: str
    asked: str
    parameter: str | None = None


def places_of(
    paths: Iterable[str], targets: Sequence[str], base: BaseLayers
) -> dict[str, WrappedTarget]:
    """Finds what each path of a file means.

    PEFT wraps an attention module and, inside of that wrapper, its output projection, which shares
    its rank. Parameters that ``target_parameters`` names are wrapped one around the other, in the
    order in which their module registered them, which only the base tells.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths, key=len):  # the outermost wrapper first
        module = path
        while module.endswith(WRAPPED):
            module = module.removesuffix(WRAPPED)
        modules[module].append(path)
    places: dict[str, WrappedTarget] = {}
    for module, nested in modules.items():
        names = _parameters(module, nested, targets, base)
        if names:
            places |= _in_parameters(module, nested, names, base)
        else:
            places[module] = _in_module(module, nested, modules)
    return places


def _in_module(module: str, nested: list[str], modules: Iterable[str]) -> WrappedTarget:
    owner, found, inner = module.partition(f"{WRAPPED}.")
    if len(nested) > 1 or nested[0] != module or (found and owner not in modules):
        raise AdapterError(
            f"{nested[-1]}: an adapter nested in another, which target_parameters does not name"
        )
    return WrappedTarget(f"{owner}.{inner}" if found else module, owner)


def _in_parameters(
    module: str, nested: list[str], names: list[str], base: BaseLayers
) -> dict[str, WrappedTarget]:
    shapes = base.parameters(module) if base.base is not None else {}
    places = {}
    for depth, (path, name) in enumerate(zip(nested, reversed(names), strict=True)):
        key = f"{module}.{name}"
        target = module if name == "weight" else key
        places[path] = WrappedTarget(target, key, name, depth, shapes.get(name))
    return places


def _parameters(
    module: str, nested: list[str], targets: Sequence[str], base: BaseLayers
) -> list[str]:
    """The parameters of a module that are adapted, in the order it registered them."""
    names, open_ended = [], False
    for target in targets:
        owner, _, name = target.rpartition(".")
        if name not in names and (not owner or module == owner or module.endswith(f".{owner}")):
            names.append(name)
            open_ended |= not owner
    if not names:
        return []
    found = names if base.base is None else [n for n in base.parameters(module) if n in names]
    if (base.base is None and (open_ended or len(names) > 1)) or (base.is_graph and len(found) > 1):
        raise AdapterError(
            f"{module}: target_parameters may mean {', '.join(names)} of it, and which, "
            "and in which order, the file does not say; pass base=, the model itself"
        )
    if found and len(found) != len(nested):
        raise AdapterError(
            f"{module}: {len(nested)} adapters in it, but target_parameters names "
            f"{', '.join(found)} of it"
        )
    return found


def read_experts(
    place: WrappedTarget, tensors: Tensors, settings: Mapping[str, Any], base: BaseLayers
) -> AnyUpdate:
    """Reads the update of every expert of a parameter; the base tells how they are stored."""
    if sorted(tensors) != [DOWN, UP]:
        raise AdapterError(f"has {sorted(tensors)}, expected {DOWN} and {UP} of experts")
    if place.shape is None:
        raise AdapterError(
            f"{DOWN} {tuple(tensors[DOWN].shape)} is of several experts at rank {settings['r']}, "
            "whose orientation the file does not say; pass base=, the model"
        )
    _, rows, columns = place.shape
    transposed = base.is_turned(place.asked.rpartition(".")[0])
    if not transposed and base.is_graph:  # no module says it, but its shapes do
        if rows == columns:
            raise AdapterError(
                f"each of the experts is {rows} by {columns}, and a graph does not say which "
                "of the two is the input; pass base=, the model itself"
            )
        transposed = tuple(tensors[DOWN].shape[1:]) == (rows,)
    own = {**place.settings, **settings, TURNED_EXPERTS: transposed}
    return experts.read(tensors, place.shape, own)


def homes_of(layers: Mapping[str, AnyUpdate]) -> dict[str, Home]:
    """Finds where the updates are kept: the reverse of `places_of`."""
    nested: dict[str, list[str]] = defaultdict(list)
    for path, update in layers.items():
        if name_of(update) is not None:
            nested[path.removesuffix(f".{name_of(update)}")].append(path)
    homes: dict[str, Home] = {}
    for module, paths in nested.items():
        by_depth = sorted(paths, key=lambda path: layers[path].stored_settings["depth"])
        for depth, path in enumerate(by_depth):
            name = f"{module}.{name_of(layers[path])}"
            homes[path] = Home(module + WRAPPED * depth, name, name)
    for path in layers:
        owner, _, inner = path.rpartition(".")
        if path not in homes:
            is_inside = owner in layers and name_of(layers[owner]) is None
            homes[path] = Home(f"{owner}{WRAPPED}.{inner}", "") if is_inside else Home(path, path)
    return homes
