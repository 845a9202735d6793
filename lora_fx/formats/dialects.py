"""How formats spell the tensors of a layer, and what is checked of them, read or to be written."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.layers.axes import convert, sizes_of
from lora_fx.layers.layer import Layer

# How every format has the two factors of a layer.
DOWN_AXES, UP_AXES = "r in *k", "out r 1*"
DOWN, UP, ALPHA, MAGNITUDE, BIAS = "down", "up", "alpha", "magnitude", "bias"
U = TypeVar("U", bound=AnyUpdate)
Tensors = Mapping[str, torch.Tensor]
Roles = dict[str, tuple[str, torch.Tensor]]  # role -> key and tensor
Layers = dict[str, Roles]
# From the tensors that the table gives no use, and the layers, to the keys that have none at all.
Claim = Callable[[Tensors, Layers], list[str]]
# What a format cannot hold of an update, in words.
Problem = Callable[[AnyUpdate], str | None]


@dataclass(frozen=True)
class Dialect:
    """The spelling of one format.

    Attributes:
        endings: end of a key -> role of the tensor.
        expected: what the message about a key of no known use ends with.
        prefix: regex of what stands before a path.
        older: end of a key -> what of it is the path's, by today's name, and today's ending.
        silent: a part of a path that says nothing.
        is_flat: a path has no dots.
        foreign: regex of a key -> the feature that it is of, known and not supported.
    """

    endings: Mapping[str, str]
    expected: str
    prefix: str = ""
    older: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    silent: str = ""
    is_flat: bool = False
    foreign: Mapping[str, str] = field(default_factory=dict)

    def split(self, key: str) -> tuple[str, str] | None:
        """The path and the role that a key means, by its longest known ending; None without one."""
        start = re.match(self.prefix, key)
        if start is None:
            return None
        rest = key[start.end() :]
        if self.silent:
            rest = f".{rest}".replace(f".{self.silent}.", ".")[1:]
        dots = [at for at, letter in enumerate(rest) if letter == "." and at]
        for dot in dots[:1] if self.is_flat else dots:
            path, ending = rest[:dot], rest[dot:]
            tail, ending = self.older.get(ending, ("", ending))
            if ending in self.endings:
                return path + tail, self.endings[ending]
        return None

    def feature(self, key: str) -> str | None:
        """The feature that a key is of, where that is known and not supported."""
        if not re.match(self.prefix, key):
            return None
        return next((what for end, what in self.foreign.items() if re.search(end, key)), None)


def sort_keys(
    tensors: Tensors, dialect: Dialect, claim: Claim = lambda rest, _: list(rest)
) -> Layers:
    """Sorts every tensor of a file by layer and role; ``claim`` knows the uses of other keys."""
    layers: Layers = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        found = dialect.split(key)
        feature = dialect.feature(key) if found is None else None
        if feature is not None:
            raise AdapterError(f"tensor {key!r} is {feature}, which is not supported")
        if found is None:
            rest[key] = tensor
        else:
            add(layers, *found, key, tensor)
    unused = claim(rest, layers)
    if unused:
        raise AdapterError(
            f"{len(unused)} tensors have names of no known use: {shorten(unused)}; expected "
            f"{dialect.expected}"
        )
    return layers


def add(layers: Layers, path: str, role: str, key: str, tensor: torch.Tensor) -> None:
    """Files a tensor under its layer's path and its role, which it may have in one spelling."""
    roles = layers.setdefault(path, {})
    if role in roles:
        raise AdapterError(
            f"tensors {roles[role][0]!r} and {key!r} are both the {role} of {path}; remove one"
        )
    roles[role] = key, tensor


def tensors_of(roles: Roles) -> dict[str, torch.Tensor]:
    """The tensors of a layer by role, without their keys."""
    return {role: tensor for role, (_, tensor) in roles.items()}


def check_pairs(layers: Layers) -> None:
    """Refuses a file that adapts nothing, and a layer that has only half of a pair."""
    check_no_half(layers.values())
    if not layers:
        raise AdapterError("no pair of down and up in it, so nothing is adapted")


def check_no_half(layers: Iterable[Roles]) -> None:
    """Refuses a layer that has only half of a pair; names the tensors that stand alone."""
    halves = [
        key for roles in layers if not {DOWN, UP} <= roles.keys() for key, _ in roles.values()
    ]
    if halves:
        raise AdapterError(f"half of a pair, down without up or up without: {shorten(halves)}")


def matrices_of(roles: Roles) -> tuple[torch.Tensor, torch.Tensor]:
    """The down- and the up-projection of a layer; refuses what are no matrices."""
    down, up = roles[DOWN][1], roles[UP][1]
    if down.ndim != 2 or up.ndim != 2:
        raise AdapterError(f"{_shapes(roles)}: expected matrices, (r, in) and (out, r)")
    return down, up


def lora_of(
    roles: Roles, rank: int, scale: float, said: str, layer: Layer | None, turned: bool = False
) -> Update:
    """LoRA of two matrices of the rank that a config says, or DoRA where there is a magnitude.

    Args:
        roles: of the layer; a magnitude has one number an output.
        rank: what the config says.
        scale: of the product.
        said: where the rank stands, for messages.
        layer: of the base, where it is known: a table is one of an embedding.
        turned: the factors are stored (in, r) and (r, out).
    """
    down, up = matrices_of(roles)
    if turned:
        down, up = down.t().contiguous(), up.t().contiguous()
    if (down.shape[0], up.shape[1]) != (rank, rank):
        shapes = f"(in, {rank}) and ({rank}, out)" if turned else f"({rank}, in) and (out, {rank})"
        raise AdapterError(f"{_shapes(roles)}, expected {shapes}, of the rank in {said}")
    key, magnitude = roles.get(MAGNITUDE, ("", None))
    is_table = layer is not None and layer.is_matrix and layer.type.reads_ids
    if magnitude is not None and (is_table or magnitude.shape != (up.shape[0],)):
        raise AdapterError(
            f"{key!r} is {tuple(magnitude.shape)}, expected ({up.shape[0]},), one number an "
            "output; one a token, of an embedding, is not supported: fuse it where it was made"
        )
    stored = EMBEDDING if is_table else None
    return with_kind(Update(down, up, scale, magnitude=magnitude, stored=stored))


def with_kind(update: Update, use_rslora: bool = False) -> Update:
    """The update of a pair by its kind; where that does not tell rsLoRA, a setting does."""
    plain = "rslora" if use_rslora else "lora"
    kind = "alora" if update.invocation else plain if update.magnitude is None else "dora"
    found = replace(update, kind=kind)
    return with_settings(found, use_rslora=True) if use_rslora and kind != plain else found


def with_settings(update: U, **settings: object) -> U:
    """The update, its source record saying more."""
    stored = SourceRecord(update.stored_tensors, {**update.stored_settings, **settings})
    return replace(update, stored=stored)


def factors_of(roles: Roles, grouped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The down- and the up-projection of a layer: of a linear one, or of a convolution.

    Args:
        roles: of the layer: down (r, in, *kernel), and up (out, r), or (out, r, 1, ...) with as
            many axes as down.
        grouped: whether up may be (out, r / groups, 1, ...), beside a grouped convolution.

    Returns:
        down as it is, and up as a matrix.
    """
    down, up = roles[DOWN][1], roles[UP][1]
    low, high = sizes_of(DOWN_AXES, down.shape), sizes_of(UP_AXES, up.shape)
    if low is None or high is None or up.ndim not in (2, down.ndim):
        raise AdapterError(
            f"{_shapes(roles)}: expected (r, in) and (out, r), or of a convolution "
            "(r, in, *kernel) and (out, r, 1, ...)"
        )
    rank, inner = low["r"], high["r"]
    if rank != inner and not (grouped and down.ndim > 2 and inner and rank % inner == 0):
        raise AdapterError(f"{_shapes(roles)}: the ranks differ, expected (r, in) and (out, r)")
    return down, up.flatten(1)


def _shapes(roles: Roles) -> str:
    (down_key, down), (up_key, up) = roles[DOWN], roles[UP]
    return f"{down_key!r} is {tuple(down.shape)} and {up_key!r} is {tuple(up.shape)}"


def up_beside(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """An up-projection (out, r) as files store it: with the axes of its down-projection."""
    return convert(up, "out r", UP_AXES, down.ndim - 2)


def magnitude_beside(down: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """A magnitude (out,) as PEFT and diffusers store it: (1, out, 1, ...) of a convolution."""
    further = down.ndim - 2
    return convert(magnitude, "n", magnitude_axes(further), further)


def magnitude_axes(further: int) -> str:
    """The axes of a magnitude as PEFT stores it, of a layer with so many kernel axes."""
    return "1 n 1*" if further else "n"


def scalar_of(roles: Roles) -> float | None:
    """The alpha that a layer's tensors hold, or None; refuses what is not one number."""
    if ALPHA not in roles:
        return None
    key, tensor = roles[ALPHA]
    if tensor.numel() != 1:
        raise AdapterError(f"{key!r} is {tuple(tensor.shape)}, expected one number")
    return float(tensor.item())


def check_held(adapter: Adapter, form: str, replaced: Iterable[str], problem: Problem) -> None:
    """Refuses an adapter that a format cannot hold.

    ``replaced`` are parameters that the format has no place for; ``problem`` says in words what
    it cannot hold of an update.
    """
    if not adapter.updates:
        raise AdapterError(f"the adapter {adapter.name} has no update to write")
    problems: dict[str, list[str]] = defaultdict(list)
    for module, update in adapter.updates.items():
        found = problem(update)
        if found is not None:
            problems[found].append(module)
    problems["replaced parameters"] += replaced
    for what, names in problems.items():
        if names:
            raise AdapterError(
                f"{form} cannot hold {what}: {shorten(names)}; "
                "write a PEFT directory, or leave them out"
            )


def not_lora(update: AnyUpdate) -> str | None:
    """Why an update is no LoRA or DoRA of a format without more, or None.

    A product of two factors is one, whatever kind of adapter it came from.
    """
    if not isinstance(update, Update):
        return f"updates of kind {update.kind!r}, which are no product of two factors"
    if not math.isfinite(update.scale):
        return "scales that are no finite number"
    if update.invocation:
        return "invocation tokens (aLoRA)"
    if update.rank == 0:
        return "updates of rank 0"
    if update.bias is not None:
        return "biases of up-projections (lora_bias)"
    if update.row is not None or update.col is not None:
        return f"updates of kind {update.kind!r}, which scale inputs or outputs"
    return None
