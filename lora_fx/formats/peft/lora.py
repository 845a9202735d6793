"""LoRA, rsLoRA and DoRA as PEFT stores them, by the kind of layer that they were made for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.parameter_updates import DOWN, UP, for_parameter, name_of
from lora_fx.adapters.scaling import alpha_for, checked_alpha
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord, is_embedding
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, within
from lora_fx.formats.dialects import UP_AXES, magnitude_axes, magnitude_beside, up_beside, with_kind
from lora_fx.formats.hints import doubt
from lora_fx.formats.peft.config import Numbers, Patterned, Tensors, low_rank
from lora_fx.formats.peft.fields import Fields, anything, checked, indices, names, words
from lora_fx.formats.peft.wrappers import WrappedTarget, homes_of, places_of, read_experts
from lora_fx.layers.axes import shape_of, sizes_of
from lora_fx.layers.base_layers import BaseLayers

UP_BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
TABLE_DOWN, TABLE_UP = "lora_embedding_A", "lora_embedding_B"
# Initial values that leave the base alone, and those that subtract something from its weights.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# How it was trained. fan_in_fan_out is among them because a saved one is unreliable: PEFT
# overwrites it with the value of the layer wrapped last, so in a model of Linear and Conv1D it is
# wrong for one of the two. The layer that the update meets decides. megatron_core names a module:
# never imported.
NEUTRAL = words(
    """corda_config eva_config fan_in_fan_out loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core qalora_group_size runtime_config"""
)
REFUSED = words(
    """arrow_config kasa_config layer_replication monteclora_config
    use_bdlora use_qalora velora_config"""
)


def check_init(init: object, origin: str, strict: bool) -> None:
    """Refuses, or with ``strict=False`` warns of, an initialisation that changed the base."""
    if init in HARMLESS_INITS:
        return
    if not isinstance(init, str) or not init.lower().startswith(BASE_CHANGING_INITS):
        said = f"init_lora_weights is {init!r:.80}"
        raise AdapterError(f"{said}, a feature that is not supported")
    message = (
        f"init_lora_weights is {init!r}: training changed the base weights too, so the adapter "
        "fits that base alone; save it with PEFT's path_initial_model_for_weight_conversion"
    )
    said = message if strict else f"{origin}: {message}"
    doubt(said, ", or pass strict=False to use it as it is", strict)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Patterned):
    """LoRA, rsLoRA, DoRA, of layers and of parameters."""

    peft_type = "LORA"
    kinds = ("lora", "rslora", "dora", "alora")
    leaves = (DOWN, UP, UP_BIAS, TABLE_DOWN, TABLE_UP, MAGNITUDE)
    ranked = (DOWN, TABLE_DOWN)
    alpha_field = "lora_alpha"
    only_bias = "lora_only"
    neutral = NEUTRAL
    refused = REFUSED
    written: ClassVar[Fields] = {"lora_dropout": 0.0, "fan_in_fan_out": False}

    lora_alpha: float = checked(checked_alpha, needed=True)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: tuple[str, ...] = checked(names, ())
    init_lora_weights: bool | str = checked(anything, True)
    alora_invocation_tokens: tuple[int, ...] | None = checked(indices, None)

    @property
    def endings(self) -> tuple[str, ...]:
        """Biases and magnitudes only where the config has them."""
        off = {UP_BIAS: not self.lora_bias, MAGNITUDE: not self.use_dora}
        return tuple(leaf for leaf in self.leaves if not off.get(leaf))

    def check(self, fields: Mapping[str, object], origin: str, strict: bool) -> None:
        """Refuses, or with ``strict=False`` warns of, an initialisation that changed the base."""
        check_init(self.init_lora_weights, origin, strict)

    def read(
        self, layers: Mapping[str, Tensors], shared: Tensors, base: BaseLayers
    ) -> tuple[dict[str, AnyUpdate], list[str]]:
        """The updates of a file's layers, each where its wrappers say."""
        places = places_of(layers, self.target_parameters, base)
        updates: dict[str, AnyUpdate] = {}
        for path, place in places.items():
            with within(path):
                updates[place.path] = self._at(place, layers[path], base)
        return updates, [place.asked for place in places.values()]

    def _at(self, place: WrappedTarget, tensors: Tensors, base: BaseLayers) -> AnyUpdate:
        if place.parameter is None:
            return read_lora(place.asked, tensors, self)
        rank, scale = self.rank_and_scale(place.asked)
        down = tensors.get(DOWN)
        is_stack = down is not None and down.shape[:1] != (rank,)
        if is_stack if place.shape is None else len(place.shape) == 3:
            if self.alora_invocation_tokens:
                raise AdapterError("aLoRA of experts, which PEFT does not run; leave it out")
            return read_experts(place, tensors, rank, scale, self.use_rslora, base)
        update = read_lora(place.asked, tensors, self)
        if update.invocation:
            raise AdapterError("aLoRA of a parameter, which PEFT does not run; leave it out")
        settings = {"parameter": place.parameter, "depth": place.depth}
        return replace(update, stored=SourceRecord({}, settings))

    @classmethod
    def holds(cls, update: AnyUpdate) -> bool:
        """Whether an update is of two factors, or of a parameter's experts."""
        if isinstance(update, Update):
            return update.row is None and update.col is None
        return name_of(update) is not None

    @classmethod
    def problems(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, list[str]]:
        """What one config cannot say of all layers."""
        low = low_rank(layers)
        without = [path for path, update in low.items() if update.magnitude is None]
        biased = [path for path, update in low.items() if update.bias is not None]
        tables = [path for path, update in low.items() if is_embedding(update.stored)]
        named = [path for path, update in layers.items() if name_of(update) is not None]
        tokens = {update.invocation for update in layers.values()}
        is_dora = len(without) < len(low)
        return {
            "of rank 0, which PEFT does not load": [p for p, u in low.items() if u.rank == 0],
            "PEFT's use_dora is for all layers, but these have no magnitude": without * is_dora,
            "PEFT has no lora_bias beside DoRA": biased * is_dora,
            "PEFT has no lora_bias of embeddings": tables * bool(biased),
            "PEFT's alora_invocation_tokens are of all layers, but these have several": list(layers)
            * (len(tokens) > 1),
            "PEFT has no DoRA or lora_bias of parameters": named * (is_dora or bool(biased)),
        }

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """Ranks and alphas, and what all layers have or none."""
        low, homes = low_rank(layers).values(), homes_of(layers).values()
        parameters = sorted(h.parameter for h in homes if h.parameter is not None)
        tokens = next(update.invocation for update in layers.values())
        # Only PEFT's model of this task looks for the tokens.
        activated = {"alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"} if tokens else {}
        return super().described(layers) | {
            "use_rslora": all(map(_is_rslora, layers.values())),
            "use_dora": any(update.magnitude is not None for update in low),
            "lora_bias": any(update.bias is not None for update in low),
            "target_parameters": tuple(parameters),
            **activated,
        }

    @classmethod
    def numbers(cls, layers: Mapping[str, AnyUpdate]) -> Numbers:
        """Rank and alpha of each layer; of rsLoRA only if all of them are."""
        use_rslora = all(map(_is_rslora, layers.values()))
        numbers = {}
        for path, update in layers.items():
            rank, scale = _rank_and_scale(update)
            numbers[path] = rank, alpha_for(scale, math.sqrt(rank) if use_rslora else rank)
        return numbers

    @classmethod
    def tensors_of(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of each layer, by leaf."""
        has_bias = any(update.bias is not None for update in low_rank(layers).values())
        return {
            path: lora_tensors(u, has_bias) if isinstance(u, Update) else dict(u.stored_tensors)
            for path, u in layers.items()
        }


def _is_rslora(update: AnyUpdate) -> bool:
    """Whether the scale of an update is alpha / sqrt(r)."""
    return update.kind == "rslora" or bool(update.stored_settings.get("use_rslora"))


def _rank_and_scale(update: AnyUpdate) -> tuple[int, float]:
    if isinstance(update, Update):
        return update.rank, update.scale
    settings = update.stored_settings
    return int(settings["r"]), float(settings["scale"])


def read_lora(path: str, tensors: Tensors, config: LoraConfig) -> Update:
    """Reads the update of one layer: shapes and rank must agree with each other and the config.

    ``lora_A`` is (r, in) or (r, in, *kernel), ``lora_B`` (out, r) or (out, r / groups, 1, ...); of
    a table (num, dim) ``lora_embedding_A`` is (r, num) and ``lora_embedding_B`` (dim, r), which are
    already down and up of a layer from num to dim. ``lora_magnitude_vector`` is (out,), or
    (1, out, 1, ...) of a convolution.
    """
    is_table = TABLE_DOWN in tensors or TABLE_UP in tensors
    first, second = (TABLE_DOWN, TABLE_UP) if is_table else (DOWN, UP)
    _check_leaves(tensors, (first, second), config, is_table)
    down, up = tensors[first], tensors[second]
    rank, scale = config.rank_and_scale(path)
    shapes = f"{first.partition('.')[0]} {tuple(down.shape)} and {tuple(up.shape)}"
    kernel = down.ndim - 2
    fits = kernel in ((0,) if is_table else (0, 1, 2, 3)) and up.ndim == down.ndim
    if not fits or sizes_of(UP_AXES, up.shape) is None:
        raise AdapterError(
            f"{shapes} are no pair: expected (r, in) and (out, r), or of a "
            "convolution (r, in, *kernel) and (out, r, 1, ...)"
        )
    ranks = up.shape[1] if kernel == 0 else rank - rank % max(up.shape[1], 1)
    if down.shape[0] != rank or ranks != rank:
        raise AdapterError(
            f"{shapes} should be of rank {rank} by r or rank_pattern: (r, in) and (out, r)"
        )
    bias, magnitude = (
        _vector(tensors, leaf, axes, up.shape[0], kernel)
        for leaf, axes in ((UP_BIAS, "n"), (MAGNITUDE, magnitude_axes(kernel)))
    )
    tokens = config.alora_invocation_tokens or ()
    if tokens and (is_table or kernel or magnitude is not None):
        raise AdapterError("aLoRA acts on linear layers, without DoRA; leave this one out")
    update = Update(down, up.flatten(1), scale, "lora", bias, magnitude, invocation=tokens)
    update = replace(update, stored=EMBEDDING) if is_table else update
    return with_kind(update, config.use_rslora)


def _check_leaves(
    tensors: Tensors, pair: tuple[str, str], config: LoraConfig, is_table: bool
) -> None:
    missing = [leaf for leaf in pair if leaf not in tensors]
    if missing:
        raise AdapterError(f"half of a pair, {missing[0]} is missing beside {sorted(tensors)}")
    wanted = {*pair, *([MAGNITUDE] if config.use_dora else [])}
    wanted |= {UP_BIAS} if config.lora_bias and not is_table else set()
    odd = sorted(wanted ^ tensors.keys())
    if odd:
        raise AdapterError(
            f"has {sorted(tensors)}, expected {sorted(wanted)}: lora_bias is "
            f"{config.lora_bias} and use_dora {config.use_dora}"
        )


def _vector(tensors: Tensors, leaf: str, axes: str, out: int, kernel: int) -> torch.Tensor | None:
    """A tensor with a number for each output, as (out,); None where there is none."""
    vector, expected = tensors.get(leaf), shape_of(axes, {"n": out}, (1,) * kernel)
    if vector is None:
        return None
    if tuple(vector.shape) != expected:
        raise AdapterError(f"{leaf} {tuple(vector.shape)}, expected {expected} as lora_B has it")
    return vector.flatten()


def lora_tensors(update: Update, has_bias: bool) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by leaf: the reverse of `read_lora`.

    A layer that has no bias gets zeros where any layer of the adapter has one (``has_bias``).
    """
    update = for_parameter(update)
    is_table = is_embedding(update.stored)
    first, second = (TABLE_DOWN, TABLE_UP) if is_table else (DOWN, UP)
    tensors = {first: update.down, second: up_beside(update.down, update.up)}
    if has_bias:
        zero = update.up.new_zeros(update.up.shape[0])
        tensors[UP_BIAS] = zero if update.bias is None else update.bias
    if update.magnitude is not None:
        tensors[MAGNITUDE] = magnitude_beside(update.down, update.magnitude)
    return tensors
