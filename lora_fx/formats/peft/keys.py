"""The keys of a PEFT file, each sorted to its use or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from lora_fx.adapters.target_rule import saved_module
from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.dialects import Dialect, Layers, Tensors, sort_keys, tensors_of
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.graph.wrappers import PARTS, PEFT_LAYER, PEFT_MODEL
from lora_fx.layers.base_layers import BaseLayers

PREFIX = PEFT_MODEL
_SHARED = "base_model."  # and no module behind it: what all layers share
BASE_BIAS = f"{PEFT_LAYER}.bias"
# PEFT stores an adapted head whole, beside its adapter, in case the vocabulary was resized.
BASE_WEIGHT = f"{PEFT_LAYER}.weight"
TOKENS = ".token_adapter.trainable_tokens_delta"
TOKEN_BASE = ".token_adapter.base_layer."
# What a saved module has in the state dict of a model that PEFT wrapped, and its biases, without a
# use, in a file under bias='all'.
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."
_ROWS = ".trainable_tokens_original"
# A key of a state dict: what stands before the adapter's name, the name, and a leaf behind it.
_NAMED = re.compile(r"(.+)\.(?!(?:weight|bias)(?:\.|\Z))([^.]+)(\.weight|\.bias|)", re.DOTALL)


@dataclass(frozen=True)
class ClassifiedTensors:
    """The tensors of a PEFT file by use.

    Attributes:
        config: what gives them a use.
        base: what is known of the model.
        layers: module path, as the file has it -> the tensors of its adapter, by leaf.
        shared: what all layers share, by leaf.
        tokens: path of a table -> its trained rows.
        replacements: parameter path -> tensor that takes the place of the base's own.
    """

    config: PeftConfig
    base: BaseLayers
    layers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    replacements: dict[str, torch.Tensor] = field(default_factory=dict)

    def claim(self, rest: Tensors, layers: Layers) -> list[str]:
        """Puts what is no layer's where it belongs; the keys that the config gives no use."""
        for path, roles in layers.items():
            self.layers[path] = tensors_of(roles)
        shared = self.config.shared_keys
        self.shared.update({shared[key]: rest[key] for key in rest.keys() & shared.keys()})
        rest = {key: tensor for key, tensor in rest.items() if key not in shared}
        own = self._is_copy_of_shared, self._is_rows
        return self._left(rest, *own, self._is_of_base, self._is_tied, self._is_of_model)

    def claim_of_base(self, rest: Tensors) -> list[str]:
        """Files what stands beside layers that are read elsewhere; the keys without a use."""
        return self._left(rest, self._is_of_base, self._is_of_model)

    def check_saved(self) -> None:
        """Refuses a config that names modules to be stored whole of which there is nothing.

        PEFT passes over a name that no module of the model has: lists are written for many models.
        """
        modules = [name.rpartition(".")[0] for name in self.replacements]
        of_base = [name.rpartition(".")[0] for name in self.base.all_parameters()]
        for name in self.config.modules_to_save:
            is_there = any(saved_module(module, [name]) for module in modules)
            is_asked = not of_base or any(saved_module(module, [name]) for module in of_base)
            if is_asked and not is_there and name not in self.config.optional_heads:
                raise AdapterError(f"modules_to_save names {name!r}, but no tensor is of it")

    @staticmethod
    def _left(rest: Tensors, *uses: Callable[[str, torch.Tensor], bool]) -> list[str]:
        """The keys that no use takes; each use knows paths, and is asked of all before the next."""
        left = [*rest]
        for use in uses:
            used = {k for k in left if k.startswith(PREFIX) and use(k[len(PREFIX) :], rest[k])}
            left = [key for key in left if key not in used]
        return left

    def _is_copy_of_shared(self, path: str, tensor: torch.Tensor) -> bool:
        """Whether it repeats what all layers share, as each has it in a state dict."""
        shared = self.shared.get(path.rpartition(".")[2])
        return shared is not None and torch.equal(shared, tensor)

    def _is_rows(self, path: str, tensor: torch.Tensor) -> bool:
        """Files trained rows, beside the adapter's layers."""
        is_one = path.endswith(TOKENS) and self.config.trainable_token_indices is not None
        if is_one:
            self.tokens[path.removesuffix(TOKENS)] = tensor
        return is_one

    def _is_of_base(self, path: str, tensor: torch.Tensor) -> bool:
        """Files a tensor of the base."""
        if self.config.bias == "all" and self._is_copy(path):
            return True
        owner = path.removesuffix(BASE_WEIGHT)
        whole = owner != path and owner in self.layers
        if whole and self._is_of_model(path, tensor):
            return True
        if not whole and not self._is_replacement(path):
            return False
        target = path.replace(TOKEN_BASE, ".")
        if path.endswith((BASE_BIAS, BASE_WEIGHT)):
            target = target.replace(".base_layer.", ".")
        is_first = target not in self.replacements
        self.replacements[target] = tensor
        return is_first

    def _is_of_model(self, path: str, tensor: torch.Tensor) -> bool:
        """Files what the base has under this name, which PEFT loads over it, whatever its config.

        So are embeddings stored whose vocabulary grew, and in a state dict all that there is. What
        the base ties is one tensor; what is equal to its own says nothing.
        """
        name = path.replace(".base_layer.", ".")
        own = self.base.parameter(name)
        if own is None:
            return False
        if torch.equal(own, tensor.to(own.dtype)):
            return True
        for known in self.base.names_of(name):
            other = self.replacements.setdefault(known, tensor)
            if other is not tensor and not torch.equal(other, tensor):
                raise AdapterError(
                    f"{name} and {known} are one tensor of the base, and the file has two values "
                    "for it: give the base that the adapter was trained on"
                )
        return True

    def _is_tied(self, path: str, tensor: torch.Tensor) -> bool:
        """Files a copy of a module stored whole, for the head that is tied to it on demand."""
        if not self.config.ensure_weight_tying or not path.endswith(".weight"):
            return False
        is_copy = any(
            torch.equal(value, tensor)
            for name, value in self.replacements.items()
            if saved_module(name.rpartition(".")[0], self.config.modules_to_save)
        )
        if is_copy:
            self.replacements[path] = tensor
        return is_copy

    def _is_copy(self, path: str) -> bool:
        module = path.partition(_ORIGINAL)[0].partition(_COPY)[0]
        is_saved = saved_module(module, self.config.modules_to_save) is not None
        return module != path and is_saved and path.endswith(".bias")

    def _is_replacement(self, path: str) -> bool:
        module, _, leaf = path.rpartition(".")
        bias = self.config.bias
        if module and saved_module(module, self.config.modules_to_save):
            return True
        if TOKEN_BASE in path:
            return path.partition(TOKEN_BASE)[0] in self.tokens
        if leaf != "bias" or ".lora_" in path or bias == "none":
            return False
        owner = path.removesuffix(BASE_BIAS) if path.endswith(BASE_BIAS) else module
        return owner in self.layers or (bias == "all" and owner == module)


def is_own_key(key: str, config: PeftConfig | type[PeftConfig]) -> bool:
    """Whether a key, as PEFT saves it, is of a tensor of the adapter's own, used or not."""
    if key in config.shared_keys or key.endswith(TOKENS):
        return True
    leaves = (*config.leaves, *config.shared_keys.values())
    return key.startswith(PREFIX) and key.endswith(tuple(f".{leaf}" for leaf in leaves))


def dialect_of(config: PeftConfig) -> Dialect:
    """PEFT's spelling, as far as a config gives it a use."""
    endings = {f".{leaf}": leaf for leaf in config.endings}
    return Dialect(
        endings,
        f"{PREFIX}<module> and one of {', '.join(endings)} under {config.peft_type}, biases by "
        "the field bias, modules by modules_to_save, and with base= given whatever the base holds",
        re.escape(PREFIX),
    )


def sort_peft(tensors: Tensors, config: PeftConfig, base: BaseLayers) -> ClassifiedTensors:
    """Sorts every tensor of a file to its use."""
    keys = ClassifiedTensors(config, base)
    sort_keys(tensors, dialect_of(config), keys.claim)
    if not keys.layers and not keys.tokens:
        raise AdapterError(f"no {PREFIX}<module>.{config.leaves[0]} in it, so nothing is adapted")
    keys.check_saved()
    clash = [path for path in keys.layers if saved_module(path, config.modules_to_save)]
    clash += [p for t in keys.tokens for p in (t, *base.heads_of(t)) if p in keys.layers]
    if clash:
        raise AdapterError(
            f"both adapted and stored whole, by modules_to_save or as tokens: {shorten(clash)}"
        )
    return keys


def unwrapped(tensors: Tensors, base: BaseLayers) -> Tensors:
    """The tensors by keys that begin as PEFT's own, whatever held the model that PEFT wrapped.

    ``module.base_model.model.fc`` of a parallel run and ``_orig_mod.base_model.model.fc`` of a
    compiled model are ``base_model.model.fc``; a module that holds the model as its ``net`` is
    left out too, unless the base is that module. Names that are the model's own, all of them, are
    what other programs write beside a config of PEFT's.
    """
    start = "" if any(is_named(key) or key.startswith(_SHARED) for key in tensors) else PREFIX
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        plain = _unwrapped(start + key, base)
        if plain in result:
            raise AdapterError(f"two tensors are {plain}, beside each other's wrappers: remove one")
        result[plain] = tensor
    return result


def is_named(key: str) -> bool:
    """Whether a key is spelled as PEFT does, whatever stands in front of that."""
    return f".{PREFIX}" in f".{key}"


def _unwrapped(key: str, base: BaseLayers) -> str:
    parts = ".".join(part for part in key.split(".") if part not in PARTS)
    before, found, path = parts.partition(PREFIX)
    if not found:
        return key
    whole = before.removeprefix("module.") + path
    is_of_base = any(whole[: dot.start()] in base.layers for dot in re.finditer(r"\.", whole))
    return PREFIX + (whole if is_of_base else path)


def as_saved(tensors: Tensors, is_known: Callable[[str], bool]) -> Tensors:
    """The tensors by the keys that PEFT saves them under; a file of PEFT's is left as it is.

    The state dict of a wrapped model has the adapter's name in its keys, and tensors of the base
    beside the adapter's. What PEFT keeps of a module or of rows beside those that an adapter
    trains is left out: nothing reads it.
    """
    short = {key: found for key in tensors if (found := _shortened(key, is_known))}
    if not short or any(map(is_known, tensors)):
        return tensors
    names = sorted({name for name, _ in short.values()})
    if len(names) > 1:
        raise AdapterError(
            f"the state dict of a model with the adapters {shorten(names)}, expected one: save the "
            "one that is meant by itself, as save_pretrained does"
        )
    [name] = names
    saved = saved_in(tensors)
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        module = key.partition(_ORIGINAL)[0]
        if (module != key and module in saved) or key.endswith(f"{_ROWS}.{name}"):
            continue
        plain = short[key][1] if key in short else key.replace(f"{_COPY}{name}.", ".")
        result[plain] = tensor
    return result


def saved_in(keys: Iterable[str]) -> set[str]:
    """The paths of the modules that an adapter holds whole, told by its state dict's keys."""
    return {key.partition(_COPY)[0] for key in keys if _COPY in key}


def _shortened(key: str, is_known: Callable[[str], bool]) -> tuple[str, str] | None:
    """The adapter's name in a key, and the key without it; None of what is none of its own.

    A vector of a module of its own loses its ``weight`` in files.
    """
    found = _NAMED.fullmatch(key)
    if found is None:
        return None
    path, name, leaf = found.groups()
    plain = next(filter(is_known, (path + leaf, path)), None)
    return None if plain is None else (name, plain)
