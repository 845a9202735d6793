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
from lora_fx.adapters.source_record import SourceRecord, is_embedding
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, doubt, within
from lora_fx.formats.peft.config import Numbers, Patterned, Tensors, low_rank
from lora_fx.formats.peft.fields import Fields, checked, indices, names, words
from lora_fx.formats.peft.wrappers import WrappedTarget, homes_of, places_of, read_experts
from lora_fx.kinds import lora
from lora_fx.layers.base_layers import BaseLayers

# The leaves by role, of a layer and of a table, and the axes that each has.
LEAVES = {
    lora.DOWN: DOWN, lora.UP: UP, lora.BIAS: "lora_B.bias",
    lora.MAGNITUDE: "lora_magnitude_vector",
}  # fmt: skip
TABLE_LEAVES = {
    lora.DOWN: "lora_embedding_A", lora.UP: "lora_embedding_B",
    lora.MAGNITUDE: LEAVES[lora.MAGNITUDE],
}  # fmt: skip
_FORM, _TABLE_FORM = lora.Form(is_grouped=True), lora.Form(down=("r", "in"))
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
    doubt(origin, message, ", or pass strict=False to use it as it is", strict)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Patterned):
    """LoRA, rsLoRA, DoRA, of layers and of parameters."""

    peft_type = "LORA"
    kinds = ("lora", "rslora", "dora", "alora")
    leaves = tuple(dict.fromkeys((*LEAVES.values(), *TABLE_LEAVES.values())))
    ranked = (LEAVES[lora.DOWN], TABLE_LEAVES[lora.DOWN])
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
    init_lora_weights: bool | str = checked(lambda name, value: value, True)  # of two types
    alora_invocation_tokens: tuple[int, ...] | None = checked(indices, None)

    @property
    def endings(self) -> tuple[str, ...]:
        """Biases and magnitudes only where the config has them."""
        off = {lora.BIAS: not self.lora_bias, lora.MAGNITUDE: not self.use_dora}
        left_out = {LEAVES[role] for role, is_off in off.items() if is_off}
        return tuple(leaf for leaf in self.leaves if leaf not in left_out)

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
        return lora.as_peft_runs(updates), [place.asked for place in places.values()]

    def _at(self, place: WrappedTarget, tensors: Tensors, base: BaseLayers) -> AnyUpdate:
        if place.parameter is None:
            return read_lora(place.asked, tensors, self)
        if self.alora_invocation_tokens:
            raise AdapterError("aLoRA of a parameter, which PEFT does not run; leave it out")
        rank, scale = self.rank_and_scale(place.asked)
        down = tensors.get(DOWN)
        is_stack = down is not None and down.shape[:1] != (rank,)
        if is_stack if place.shape is None else len(place.shape) == 3:
            own = {"r": rank, "scale": scale, "use_rslora": self.use_rslora}
            return read_experts(place, tensors, own, base)
        update = read_lora(place.asked, tensors, self)
        return replace(update, stored=SourceRecord({}, place.settings))

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
            if isinstance(update, Update):
                rank, scale = update.rank, update.scale
            else:
                rank, scale = (update.stored_settings[name] for name in ("r", "scale"))
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


def read_lora(path: str, tensors: Tensors, config: LoraConfig) -> Update:
    """Reads the update of one layer: its tensors must be those that the config says.

    Of a table (num, dim) the factors are (r, num) and (dim, r), which are already down and up of a
    layer from num to dim.
    """
    is_table = any(TABLE_LEAVES[role] in tensors for role in (lora.DOWN, lora.UP))
    leaves = TABLE_LEAVES if is_table else LEAVES
    wanted = {role: leaf for role, leaf in leaves.items() if leaf in config.endings}
    factors = {wanted[lora.DOWN], wanted[lora.UP]}
    if ({*wanted.values()} ^ tensors.keys()) - factors:
        raise AdapterError(
            f"has {sorted(tensors)}, expected {sorted(wanted.values())}: lora_bias is "
            f"{config.lora_bias} and use_dora {config.use_dora}"
        )
    roles = {role: (leaf, tensors[leaf]) for role, leaf in wanted.items() if leaf in tensors}
    rank, scale = config.rank_and_scale(path)
    update = lora.read(
        roles,
        _TABLE_FORM if is_table else _FORM,
        scale=scale,
        rank=(rank, "r or rank_pattern"),
        is_table=is_table,
        use_rslora=config.use_rslora,
        invocation=config.alora_invocation_tokens or (),
    )
    is_linear = not is_table and update.down.ndim == 2
    if update.invocation and not (is_linear and update.magnitude is None):
        raise AdapterError("aLoRA acts on linear layers, without DoRA; leave this one out")
    return update


def lora_tensors(update: Update, has_bias: bool) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by leaf: the reverse of `read_lora`.

    A layer that has no bias gets zeros where any layer of the adapter has one (``has_bias``).
    """
    update = for_parameter(update)
    if has_bias and update.bias is None:
        update = replace(update, bias=update.up.new_zeros(update.up.shape[0]))
    leaves = TABLE_LEAVES if is_embedding(update.stored) else LEAVES
    return {leaves[role]: tensor for role, tensor in lora.stored(update, _FORM).items()}
