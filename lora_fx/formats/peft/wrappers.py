"""PEFT's wrappers: where a file's paths belong, what is read of experts, and the way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_fx.adapters.other_updates import AnyUpdate, WeightUpdate, added_to_each
from lora_fx.adapters.parameter_updates import DOWN, TURNED_EXPERTS, UP, name_of
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.errors import AdapterError
from lora_fx.layers.base_layers import BaseLayers

Tensors = Mapping[str, torch.Tensor]
WRAPPED = ".base_layer"


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
    found = names
    if base.base is not None:
        found = [name for name in base.parameters(module) if name in names]
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
    place: WrappedTarget,
    tensors: Tensors,
    rank: int,
    scale: float,
    use_rslora: bool,
    base: BaseLayers,
) -> WeightUpdate:
    """Reads ``W[e] + scale * up[e] @ down[e]`` for every expert e, W as the layer stores it.

    ``lora_A`` (r * experts, in) has the experts one after the other, ``lora_B``
    (out, r * experts) their columns of one rank next to each other: ``ParamWrapper`` of PEFT 0.21.

    The parameter is (experts, out, in), or (experts, in, out); the base tells which.
    """
    if sorted(tensors) != [DOWN, UP]:
        raise AdapterError(f"has {sorted(tensors)}, expected {DOWN} and {UP} of experts")
    shape = place.shape
    if shape is None:
        raise AdapterError(
            f"{DOWN} {tuple(tensors[DOWN].shape)} is of several experts at rank {rank}, "
            "whose orientation the file does not say; pass base=, the model"
        )
    count, rows, columns = shape
    transposed = _is_transposed(place, tensors, base)
    out, into = (columns, rows) if transposed else (rows, columns)
    expected = (rank * count, into), (out, rank * count)
    found = tuple(tensors[DOWN].shape), tuple(tensors[UP].shape)
    if found != expected:
        raise AdapterError(
            f"lora_A and lora_B are {found}, expected {expected} for rank {rank} and "
            f"{place.parameter} {shape}"
        )
    wide = torch.promote_types(tensors[DOWN].dtype, torch.float32)
    down = tensors[DOWN].to(wide).reshape(count, rank, into)
    up = tensors[UP].to(wide).reshape(out, rank, count).permute(2, 0, 1) * scale
    left, right = (down.transpose(1, 2), up.transpose(1, 2)) if transposed else (up, down)
    own = {"r": rank, "scale": scale, "use_rslora": use_rslora, TURNED_EXPERTS: transposed}
    kind, stored = "rslora" if use_rslora else "lora", SourceRecord(tensors, place.settings | own)
    return WeightUpdate(kind, added_to_each(left.contiguous(), right.contiguous()), shape, stored)


def _is_transposed(place: WrappedTarget, tensors: Tensors, base: BaseLayers) -> bool:
    """Whether each expert is (in, out): what the module says, else what the shapes do."""
    assert place.shape is not None
    says_so = base.is_turned(place.asked.rpartition(".")[0])
    if says_so or not base.is_graph:
        return says_so
    _, rows, columns = place.shape
    if rows == columns:
        raise AdapterError(
            f"each of the experts is {rows} by {columns}, and a graph does not say which "
            "of the two is the input; pass base=, the model itself"
        )
    return tuple(tensors[DOWN].shape[1:]) == (rows,)


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
