"""llama.cpp's adapters in GGUF, as its ``convert_lora_to_gguf.py`` makes them of PEFT's."""

from __future__ import annotations

import re
from itertools import chain, starmap
from pathlib import Path

from lora_fx.adapters.adapter import Adapter, AnyUpdate
from lora_fx.adapters.row_blocks import in_halves
from lora_fx.adapters.scaling import alpha_in
from lora_fx.errors import AdapterError, within
from lora_fx.formats.dialects import Dialect, check_adapted, sort_keys
from lora_fx.formats.hints import Hints
from lora_fx.io.state_dict import metadata_of, read_file
from lora_fx.kinds import experts, lora
from lora_fx.kinds.lora import DOWN, UP
from lora_fx.layers.trainer_names import is_turned

DIALECT = Dialect(
    {".weight.lora_a": DOWN, ".weight.lora_b": UP},
    "<tensor>.weight.lora_a and .weight.lora_b",
    foreign={r"_norm\.weight$": "a norm as a whole, which llama.cpp itself passes over"},
)
_FORM, _TABLE = lora.Form(down=("r", "in")), "token_embd"
_ALPHA, _TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(\w+)_exps")


def read_gguf(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads LoRA and aLoRA of linear layers, tables and experts; an alpha of 0 is the rank.

    The base is needed, a model of transformers: llama.cpp has other names, and of some models the
    rows in another order. Source: ``src/llama-adapter.cpp`` and ``conversion/`` of llama.cpp.
    """
    said, tensors = metadata_of(path), read_file(path, hints.allow_pickle)
    with within(path):
        form = said.get("general.type"), said.get("adapter.type")
        if form != ("adapter", "lora"):
            raise AdapterError(
                f"is of the types {form}, expected adapter and lora: give an adapter"
            )
        base = hints.layers
        turned = is_turned(base, said.get("general.architecture"))
        alpha = alpha_in(said, _ALPHA)
        tokens = tuple(map(int, re.findall(r"\d+", said.get(_TOKENS, ""))))
        layers = sort_keys(tensors, DIALECT)
        check_adapted(layers)
        named = {_EXPERTS.sub(r"layers.\1.mlp.-.\2_proj", p): own for p, own in layers.items()}
        updates: dict[str, AnyUpdate] = {}
        for place, roles in chain.from_iterable(starmap(experts.apart, named.items())):
            with within(place):
                across = roles if ".experts." in place else {DOWN} if place == _TABLE else ()
                own = {r: (key, t.T if r in across else t) for r, (key, t) in roles.items()}
                update = lora.read(own, _FORM, alpha=alpha or None, invocation=tokens)
                heads = _HEADS.get(place.rpartition(".")[2], "") if turned else ""
                count = getattr(base.config, heads, None)
                updates[place] = in_halves(update, count) if heads else update
    return Adapter(name, updates)
