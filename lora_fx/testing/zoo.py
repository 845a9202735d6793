"""Real architectures with random weights and small sizes, traced once a process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.frontend.trace import trace
from lora_fx.testing.models import Ragged

_SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
_TEXT = {"vocab_size": 97, "max_position_embeddings": 32}
_WRITER = {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES: dict[str, dict[str, Any]] = {
    "bert": _SMALL | _TEXT,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 40, "n_positions": 32}
    | {"vocab_size": 97, **_WRITER},
    "llama": _SMALL | _GROUPED | _TEXT | _WRITER,
    "qwen2": _SMALL | _GROUPED | _TEXT | _WRITER,
    "t5": {"d_model": 24, "d_kv": 6, "num_heads": 4, "num_layers": 2, "d_ff": 40}
    | {"vocab_size": 97, "use_cache": False, "decoder_start_token_id": 0},
    "vit": _SMALL | {"image_size": 16, "patch_size": 4},
}


def tiny(architecture: str, **changes: Any) -> Any:
    """A small model of transformers with random weights, of torch's own random state.

    Args:
        architecture: the name of a class for BERT, GPT-2, Llama, Qwen2, T5 or ViT, such as
            ``"BertModel"``.
        **changes: fields of its config.
    """
    import transformers

    cls = getattr(transformers, architecture)
    return cls(cls.config_class(**{**_SIZES[cls.config_class.model_type], **changes}))


@dataclass(frozen=True)
class Case:
    """A model with inputs of two shapes and the layers to adapt.

    Attributes:
        model: in evaluation mode.
        inputs: by name, what it is traced with.
        others: by name, of another batch and length.
        dynamic: the axes that differ, as `lora_fx.trace` takes them.
        targets: ends of the paths of the layers to adapt.
        head: name of the last module.
    """

    model: nn.Module
    inputs: dict[str, Any]
    others: dict[str, Any]
    dynamic: dict[str, Any]
    targets: list[str]
    head: str


def _text_case(model: nn.Module, targets: list[str], head: str, decoder: bool = False) -> Case:
    make = torch.Generator().manual_seed(5)
    ids, longer = (torch.randint(3, 97, s, generator=make) for s in ((2, 7), (3, 11)))
    axes = {0: "batch", 1: "sequence"}
    if decoder:
        inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        others = {"input_ids": longer, "decoder_input_ids": longer[:, :6]}
        dynamic = {"input_ids": axes, "decoder_input_ids": {0: "batch", 1: "target"}}
        return Case(model, inputs, others, dynamic, targets, head)
    masks = [torch.ones_like(ids), torch.ones_like(longer)]
    masks[1][0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": masks[0]}
    others = {"input_ids": longer, "attention_mask": masks[1]}
    return Case(model, inputs, others, dict.fromkeys(inputs, axes), targets, head)


def _bert() -> Case:
    return _text_case(tiny("BertModel"), ["query", "value", "dense"], "pooler")


def _llama() -> Case:
    model = tiny("LlamaForCausalLM", attention_bias=True)
    return _text_case(model, ["q_proj", "k_proj", "down_proj"], "lm_head")


def _qwen2() -> Case:
    model = tiny("Qwen2ForCausalLM", tie_word_embeddings=True)
    return _text_case(model, ["q_proj", "v_proj", "up_proj"], "norm")


def _gpt2() -> Case:
    return _text_case(tiny("GPT2LMHeadModel"), ["c_attn", "c_fc", "mlp.c_proj"], "ln_f")


def _t5() -> Case:
    model = tiny("T5ForConditionalGeneration")
    return _text_case(model, ["q", "v", "wo"], "lm_head", decoder=True)


def _vit() -> Case:
    make = torch.Generator().manual_seed(5)
    one, other = (torch.randn(n, 3, 16, 16, generator=make) for n in (2, 3))
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    inputs, others, axes = {"pixel_values": one}, {"pixel_values": other}, {0: "batch"}
    return Case(tiny("ViTModel"), inputs, others, {"pixel_values": axes}, targets, "pooler")


def _mlp() -> Case:
    torch.manual_seed(0)
    make = torch.Generator().manual_seed(5)
    one, other = (torch.randn(*s, 3, generator=make) for s in ((4, 7), (2, 9)))
    axes = {"x": {0: "batch", 1: "length"}}
    return Case(Ragged(), {"x": one}, {"x": other}, axes, ["wide", "again", "narrow"], "narrow")


ZOO: dict[str, Callable[[], Case]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mlp": _mlp,
    "qwen2": _qwen2,
    "t5": _t5,
    "vit": _vit,
}


def zoo(name: str) -> tuple[Case, fx.GraphModule]:
    """A case of ``ZOO`` and its graph, traced once a process; the model is a fresh copy.

    All but ``"mlp"`` need transformers.
    """
    case, gm = traced(name)
    return replace(case, model=copy.deepcopy(case.model)), gm


@functools.cache
def traced(name: str) -> tuple[Case, fx.GraphModule]:
    """A case of ``ZOO`` and its graph of that very model: both are only read."""
    case = untraced(name)
    return case, trace(case.model, (), case.inputs, dynamic_shapes=case.dynamic)


def untraced(name: str) -> Case:
    """A case of ``ZOO``, made anew with the same numbers."""
    torch.manual_seed(7)
    case = ZOO[name]()
    case.model.eval()
    return case
