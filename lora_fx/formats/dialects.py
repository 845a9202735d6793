"""How formats spell the tensors of a layer, and what none but a PEFT directory can hold."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.source_record import is_embedding, is_told
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError, shorten

ALPHA = "alpha"  # a role beside those of `lora_fx.kinds.lora`
Tensors = Mapping[str, torch.Tensor]
Roles = dict[str, tuple[str, torch.Tensor]]  # role -> key and tensor
Layers = dict[str, Roles]
Contents = tuple[dict[str, torch.Tensor], dict[str, str]]  # tensors, and texts beside
# From the tensors that the table gives no use, and the layers, to the keys that have none at all.
Claim = Callable[[Tensors, Layers], list[str]]
# What a format cannot hold of an update, in words.
Problem = Callable[[AnyUpdate], str | None]
# What some formats have a place for, beside two factors and a scale.
EMBEDDINGS, BIASES = "updates of embeddings", "biases of up-projections (lora_bias)"
DORA, GROUPS = "DoRA", "grouped up-projections"


@dataclass(frozen=True)
class Dialect:
    """The spelling of one format.

    Attributes:
        endings: end of a key -> role of the tensor.
        expected: what the message about a key of no known use ends with.
        prefix: regex of what stands before a path.
        older: end of a key -> what of it is the path's, by today's name, and the role.
        silent: regex of a part of a path, or of more, that says nothing.
        foreign: regex of a key -> the feature that it is of, known and not supported.
    """

    endings: Mapping[str, str]
    expected: str
    prefix: str = ""
    older: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    silent: str = "(?!)"
    foreign: Mapping[str, str] = field(default_factory=dict)

    def split(self, key: str) -> tuple[str, str] | None:
        """The path and the role that a key means, by its longest known ending; None without one."""
        start = re.match(self.prefix, key)
        if start is None:
            return None
        rest = re.sub(rf"(?<=\.)(?:{self.silent})\.", "", key[start.end() :])
        for dot in re.finditer(r"(?<!^)\.", rest):
            path, ending = rest[: dot.start()], rest[dot.start() :]
            tail, role = self.older.get(ending, ("", self.endings.get(ending)))
            if role is not None:
                return path + tail, role
        return None


def sort_keys(
    tensors: Tensors, dialect: Dialect, claim: Claim = lambda rest, _: list(rest)
) -> Layers:
    """Sorts every tensor of a file by layer and role; ``claim`` knows the uses of other keys."""
    layers: Layers = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        feature = next((what for end, what in dialect.foreign.items() if re.search(end, key)), None)
        if feature is not None:
            raise AdapterError(f"tensor {key!r} is {feature}, which is not supported")
        found = dialect.split(key)
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


def tensors_of(roles: Mapping[str, tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a layer by role, without their keys."""
    return {role: tensor for role, (_, tensor) in roles.items()}


def check_adapted(layers: Layers) -> None:
    """Refuses a file that adapts nothing."""
    if not layers:
        raise AdapterError("no pair of down and up in it, so nothing is adapted")


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
                "write a PEFT directory or plain LoRA (to_lora, --to-lora), or leave them out"
            )


def not_lora(update: AnyUpdate, holds: Collection[str] = ()) -> str | None:
    """Why an update is no LoRA of a format, in words, or None.

    A product of two factors is LoRA, whatever kind of adapter it came from; ``holds`` are the words
    of what else the format has a place for.
    """
    if is_embedding(update.stored) and EMBEDDINGS not in holds and not is_told(update.stored):
        return EMBEDDINGS
    if not isinstance(update, Update):
        return f"updates of kind {update.kind!r}, which are no product of two factors"
    scales = update.row is not None or update.col is not None
    found = {
        "scales that are no finite number": not math.isfinite(update.scale),
        "invocation tokens (aLoRA)": bool(update.invocation),
        "updates of rank 0": update.rank == 0,
        BIASES: update.bias is not None,
        f"updates of kind {update.kind!r}, which scale inputs or outputs": scales,
        DORA: update.magnitude is not None,
        GROUPS: update.groups > 1,
    }
    return next((words for words, there in found.items() if there and words not in holds), None)
