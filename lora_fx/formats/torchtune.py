"""Adapters of torchtune: its own names and order of rows, beside an ``adapter_config.json``."""

from __future__ import annotations

from pathlib import Path

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.adapters.row_blocks import in_halves
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.dialects import Dialect, check_adapted, sort_keys
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import CONFIG, read_config, weights_in
from lora_fx.formats.peft.lora import LoraConfig
from lora_fx.io.state_dict import read_file
from lora_fx.kinds import lora
from lora_fx.kinds.lora import DOWN, MAGNITUDE, UP
from lora_fx.layers.base_layers import BaseLayers

DIALECT = Dialect(
    {
        ".lora_a.weight": DOWN, ".lora_b.weight": UP,
        ".magnitude": MAGNITUDE, ".magnitude.weight": MAGNITUDE,
    },
    "<module>.lora_a.weight, .lora_b.weight and .magnitude",
)  # fmt: skip
_FORM = lora.Form(down=("r", "in"))
# How many heads a projection is of: torchtune has their rows in pairs, transformers in halves.
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_TURNED, _KEPT = {"llama", "mistral", "gemma", "gemma2"}, {"qwen2"}  # in pairs, and in halves


def is_torchtune(directory: Path) -> bool:
    """Whether a directory has torchtune's own files beside a config."""
    return (directory / CONFIG).is_file() and _last(directory) is not None


def read_torchtune(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what a LoRA recipe of torchtune trained, for its own models and transformers'.

    The base is needed, torchtune's model or that of transformers, whose names and heads tell what
    the rows are.
    """
    file = path if path.is_file() else weights_in(path) or _last(path)
    if file is None:
        raise AdapterError(f"{path}: holds neither adapter_model.pt nor adapter_0.pt")
    config = read_config(file.with_name(CONFIG), hints.strict)
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{file.with_name(CONFIG)}: peft_type is {config.peft_type}, not LORA")
    tensors = read_file(file, hints.allow_pickle)
    with within(file):
        if hints.base is None:
            raise AdapterError(
                "has torchtune's names and rows; pass base=, the model that it is for"
            )
        layers, base = sort_keys(tensors, DIALECT), hints.layers
        check_adapted(layers)
        updates: dict[str, AnyUpdate] = {}
        for own, roles in layers.items():
            with within(own):
                rank, scale = config.rank_and_scale(own)
                update = lora.read(roles, _FORM, scale=scale, rank=(rank, CONFIG))
                updates[own] = update if own in base else _turned(update, own, base)
    return Adapter(name, updates)


def _last(directory: Path) -> Path | None:
    """The file of torchtune's own names, one an epoch, that was written last."""
    files = {path.stem.removeprefix("adapter_"): path for path in directory.glob("adapter_*.pt")}
    return files.get(max(filter(str.isdecimal, files), key=int, default="model"))


def _turned(update: Update, own: str, base: BaseLayers) -> Update:
    heads, kind = _HEADS.get(own.rpartition(".")[2]), getattr(base.config, "model_type", None)
    if heads is None or kind in _KEPT:
        return update
    if kind not in _TURNED:
        raise AdapterError(
            f"the base is a {kind!r}: which rows of a head belong together is known of "
            f"{shorten(sorted(_TURNED | _KEPT))}; pass base=, a model of transformers, or "
            "let torchtune write PEFT's format"
        )
    return in_halves(update, getattr(base.config, heads, None))
