"""PEFT's types of adapters: to support another, add its record and its place in the table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.safe_regex import MAX_LENGTH, compile_bounded
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.errors import AdapterError, doubt, shorten, within
from lora_fx.formats.peft.config import PeftConfig, Tensors, agreed
from lora_fx.formats.peft.fields import (
    Fields,
    checked,
    indices,
    names_or_regex,
    parse,
    refused_in,
    words,
)
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.formats.peft.products import AdaloraConfig, LohaConfig, LokrConfig, VeraConfig
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import BaseLayers

LEAF = "trainable_tokens_delta"
_NO_TOKENS = words("trainable_token_indices ensure_weight_tying")


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
            found = compile_bounded(modules, "feedforward_modules").fullmatch(path)
            return {"feedforward": found is not None}
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

    @classmethod
    def holds(cls, update: AnyUpdate) -> bool:
        """Whether an update is PEFT's: of convolutions OneTrainer has the inverse."""
        is_ours = update.stored_settings.get("writer") != "onetrainer" or len(update.shape) == 2
        return is_ours and super().holds(update)

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
        doubt(origin, message, ", or pass strict=False to use today's", strict)


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
        for table in (path, *(head for head in base.heads_of(path) if head not in rows)):
            with within(table):
                tied_to = {} if table == path else {"tied": path}
                updates[table] = read_rows(table, {LEAF: own}, indices, base, **tied_to)
    return updates


def read_rows(
    path: str, tensors: Tensors, indices: Sequence[int], base: BaseLayers, **settings: str
) -> AnyUpdate:
    """Reads the trained rows of one table, or of a head."""
    shape = base.shape_of(path)
    # A head has a row for each token too, but is linear; without a base its name tells.
    is_head = base[path].is_linear if shape else "head" in path.rpartition(".")[2]
    own = {"indices": list(indices), "head": is_head, **settings}
    return KINDS["tokens"].read(tensors, own | ({"shape": shape} if shape else {}))


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


def is_traced(fields: Mapping[str, object]) -> bool:
    """Whether a config is of a type, or of LoRA with an option, that no kind of ours computes."""
    name = fields.get("peft_type")
    if not isinstance(name, str) or not name:
        return False
    if name == LoraConfig.peft_type:
        return bool(refused_in(fields, LoraConfig))
    return name not in TYPES


def parse_any(fields: Mapping[str, object], origin: str, strict: bool) -> PeftConfig:
    """Checks the fields of a config of any type, as `fields.parse` does."""
    if not is_traced(fields):
        return parse(fields, origin, strict, TYPES)
    from lora_fx.traced_adapters.config import parse as parse_traced

    with within(origin):
        return parse_traced(fields, origin, strict)
