"""PEFT's types of adapters: to support another, add its record and its place in the table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.safe_regex import MAX_LENGTH, compile_bounded
from lora_fx.adapters.scaling import checked_alpha, checked_rank
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.hints import doubt
from lora_fx.formats.peft import lora
from lora_fx.formats.peft.config import PeftConfig, Tensors, agreed
from lora_fx.formats.peft.fields import (
    Fields,
    checked,
    indices,
    masks,
    names_or_regex,
    parse,
    refused_in,
    words,
)
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.formats.peft.lycoris import LohaConfig, LokrConfig
from lora_fx.formats.peft.vera import VeraConfig
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import BaseLayers

LEAF = "trainable_tokens_delta"
_NO_TOKENS = words("trainable_token_indices ensure_weight_tying")


@dataclass(frozen=True, kw_only=True)
class AdaloraConfig(PeftConfig):
    """AdaLoRA, whose layers never look at LoRA's fields, whatever the config says of them."""

    peft_type = "ADALORA"
    kinds = ("adalora",)
    leaves = ("lora_A", "lora_B", "lora_E")
    ranked = ("lora_A",)
    rank_field = "init_r"
    only_bias = "lora_only"
    neutral = lora.NEUTRAL | words(
        """r use_rslora alpha_pattern lora_bias init_lora_weights target_r tinit tfinal deltaT beta1
        beta2 orth_reg_weight total_step"""
    )
    refused = lora.REFUSED | words("alora_invocation_tokens use_dora target_parameters")
    # PEFT refuses a config without steps to train; these are never taken.
    written: ClassVar[Fields] = {"total_step": 1, "tinit": 0, "tfinal": 0}

    init_r: int = checked(checked_rank, 12, needed=True)
    lora_alpha: float = checked(checked_alpha, needed=True)
    rank_pattern: Mapping[str, list[bool]] | None = checked(masks, None)

    def rank_of(self, path: str) -> int:
        """What is left of the rank of a layer."""
        mask = self._mask(path)
        return self.init_r if mask is None else sum(mask)

    def _mask(self, path: str) -> list[bool] | None:
        return (self.rank_pattern or {}).get(f"{path}.lora_E")

    def settings(self, path: str, tensors: Tensors) -> Fields:
        """Alpha is the scale, divided by the rank before the pruning."""
        scale = self.lora_alpha if self.lora_alpha > 0 else self.rank_of(path)
        known = {"ranknum": self.init_r, "alpha": self.lora_alpha, "mask": self._mask(path)}
        return {"scale": scale, **known}

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """Rank and alpha, and what was left of each layer that was pruned."""
        kept = {f"{p}.lora_E": update.stored_settings.get("mask") for p, update in layers.items()}
        return {
            "init_r": int(agreed(layers, "ranknum")),
            "lora_alpha": agreed(layers, "alpha"),
            "rank_pattern": {key: mask for key, mask in kept.items() if mask is not None} or None,
        }


@dataclass(frozen=True, kw_only=True)
class Ia3Config(PeftConfig):
    """(IA)3; without ``feedforward_modules`` PEFT chooses by the type of the model."""

    peft_type = "IA3"
    kinds = ("ia3",)
    leaves = ("ia3_l",)
    lacks = _NO_TOKENS | words("bias layers_to_transform layers_pattern")
    neutral = words("fan_in_fan_out init_ia3_weights")
    keeps_rule = False  # PEFT wants the feed-forward layers to be among its names

    feedforward_modules: str | tuple[str, ...] | None = checked(names_or_regex, None)

    def settings(self, path: str, tensors: Tensors) -> Fields:
        """Whether the layer is scaled at its input; PEFT compares ends without a dot."""
        modules = self.feedforward_modules
        if modules is None:
            shape = tuple(tensors["ia3_l"].shape) if "ia3_l" in tensors else ()
            if len(shape) != 2 or shape[0] == shape[1]:
                raise AdapterError(
                    f"feedforward_modules is missing, and ia3_l {shape} of {path} does not tell "
                    "whether the layer is one; add the field to the config"
                )
            return {"feedforward": shape[0] == 1}
        if isinstance(modules, str):
            pattern = compile_bounded(modules, "feedforward_modules")
            return {"feedforward": pattern.fullmatch(path) is not None}
        return {"feedforward": path.endswith(modules)}

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """The layers that are scaled at their input: ends of paths, or a regex."""
        every = sorted(layers)
        inner = [path for path in every if layers[path].stored_settings["feedforward"]]
        regex = "|".join(re.escape(path) for path in inner)
        if inner and len(regex) <= MAX_LENGTH:
            return {"feedforward_modules": regex}
        extra = [path for path in every if path.endswith(tuple(inner)) and path not in inner]
        if inner and extra:
            raise AdapterError(
                f"PEFT's feedforward_modules would mean {shorten(extra)} too, which is "
                "scaled at its output"
            )
        return {"feedforward_modules": inner}


@dataclass(frozen=True, kw_only=True)
class OftConfig(PeftConfig):
    """OFT, of PEFT's formulas of today."""

    peft_type = "OFT"
    kinds = ("oft",)
    leaves = ("oft_R.weight", "oft_embedding_R.weight")
    only_bias = "oft_only"
    lacks = _NO_TOKENS
    neutral = words("module_dropout fan_in_fan_out init_weights")
    options = (
        "r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann",
        "num_cayley_neumann_terms",
    )  # fmt: skip

    r: int = 0
    oft_block_size: int = 32
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def check(self, fields: Mapping[str, object], origin: str, strict: bool) -> None:
        """Refuses, or with ``strict=False`` warns of, an OFT of other formulas than today's.

        PEFT changed them in 0.14, with the field oft_block_size, and the series in 0.18, with the
        field peft_version.
        """
        if "oft_block_size" not in fields:
            raise AdapterError(
                "oft_block_size is missing, so it is an OFT of PEFT before 0.14, of other "
                "formulas; train it again with a newer PEFT"
            )
        version = fields.get("peft_version")
        found = re.match(r"(\d{1,6})\.(\d{1,6})\.", str(version))
        is_new = found is not None and tuple(map(int, found.groups())) >= (0, 18)
        if is_new or not self.use_cayley_neumann:
            return
        message = (
            f"peft_version is {version!r}, and PEFT before 0.18 had another series for "
            "use_cayley_neumann; train it again with a newer PEFT"
        )
        said = message if strict else f"{origin}: {message}"
        doubt(said, ", or pass strict=False to use today's", strict)


@dataclass(frozen=True, kw_only=True)
class TokensConfig(PeftConfig):
    """Trained rows of a table."""

    peft_type = "TRAINABLE_TOKENS"
    kinds = ("tokens",)
    leaves = (LEAF,)
    lacks = _NO_TOKENS | words(
        "bias exclude_modules layers_to_transform layers_pattern modules_to_save"
    )
    neutral = words("init_weights")

    token_indices: tuple[int, ...] = checked(indices, ())

    def _rule(self) -> TargetRule | None:
        return None

    def _read_one(self, path: str, tensors: Tensors, base: BaseLayers) -> AnyUpdate:
        return read_rows(path, tensors, self.token_indices, base)

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """The tokens of all tables."""
        return {"token_indices": tuple(agreed(layers, "indices", ()))}


TYPES: dict[str, type[PeftConfig]] = {
    made.peft_type: made
    for made in (
        LoraConfig, AdaloraConfig, LohaConfig, LokrConfig, VeraConfig, Ia3Config, OftConfig,
        TokensConfig,
    )
}  # fmt: skip


def read_tokens(rows: Tensors, config: PeftConfig, base: BaseLayers) -> dict[str, AnyUpdate]:
    """Reads the trained rows of every table of a file, and of the heads tied to them.

    PEFT trains what ``tie_word_embeddings`` ties, and stores one; the base tells the heads.
    """
    if config.trainable_token_indices is not None and not rows:
        raise AdapterError(f"trainable_token_indices is there, but no .{LEAF} is")
    updates: dict[str, AnyUpdate] = {}
    for path, own in rows.items():
        indices = _indices(path, config)
        for table in (path, *(tied for tied in base.tied_to(path) if tied not in rows)):
            with within(table):
                tied_to = {} if table == path else {"tied": path}
                updates[table] = read_rows(table, {LEAF: own}, indices, base, **tied_to)
    return updates


def read_rows(
    path: str, tensors: Tensors, indices: Sequence[int], base: BaseLayers, **settings: str
) -> AnyUpdate:
    """Reads the trained rows of one table, or of a head."""
    shape = base.shape_of(path)
    own = {"indices": list(indices), "head": _is_head(path, base)}
    return KINDS["tokens"].read(tensors, own | settings | ({"shape": shape} if shape else {}))


def _is_head(path: str, base: BaseLayers) -> bool:
    """Whether a layer with a row for each token is linear; without a base its name tells."""
    if base.shape_of(path):
        return base[path].is_linear
    return "head" in path.rpartition(".")[2]


def _indices(path: str, config: PeftConfig) -> Sequence[int]:
    tokens = config.trainable_token_indices
    if not isinstance(tokens, Mapping):
        return tokens or ()
    for name, found in tokens.items():
        if path.endswith(name):
            return found
    raise AdapterError(
        f"trainable_token_indices names {', '.join(tokens)}, not {path}, of which "
        "there are trained tokens"
    )


@dataclass(frozen=True, kw_only=True)
class TracedConfig(PeftConfig):
    """A config whose type, or an option of LoRA's, has no kind of ours.

    Attributes:
        name: of the type.
        given: all of its fields.
    """

    name: str
    given: Mapping[str, object]

    @property
    def only_bias(self) -> str:  # type: ignore[override]  # known with the name
        """What ``bias`` is called where biases of adapted layers alone are stored."""
        return f"{self.name.lower()}_only"


def is_traced(fields: Mapping[str, object]) -> bool:
    """Whether a config is of a type, or of LoRA with an option, that no kind of ours computes."""
    name = fields.get("peft_type")
    if not isinstance(name, str) or not name:
        return False
    if name == LoraConfig.peft_type:
        return bool(refused_in(fields, LoraConfig))
    return name not in TYPES


def parse_any(fields: Mapping[str, object], origin: str, strict: bool) -> PeftConfig:
    """Checks the fields of a config of any type, as `config.parse` does."""
    if not is_traced(fields):
        return parse(fields, origin, strict, TYPES)
    from lora_fx.traced_adapters.config import parse as parse_traced

    with within(origin):
        return parse_traced(fields, origin, strict)
