"""Keys of a PEFT file: each is used, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.peft_config import PeftLora
from lora_fx.formats.peft_keys import PREFIX, SortedKeys, saved_module, sort_keys

FILE = Path("adapter.safetensors")
PAIR = ("fc.lora_A.weight", "fc.lora_B.weight")
HEADS = frozenset({"classifier", "score"})


def sort(*names: str, **fields: Any) -> SortedKeys:
    config = PeftLora(r=2, alpha=3, **fields)
    tensors = {name if name.startswith("!") else PREFIX + name: torch.ones(1) for name in names}
    return sort_keys(FILE, {key.lstrip("!"): value for key, value in tensors.items()}, config)


def test_every_kind_of_key_finds_its_use() -> None:
    keys = sort(
        *PAIR,
        "fc.lora_B.bias",
        "fc.base_layer.bias",
        "norm.bias",
        "head.dense.weight",
        "head.dense.bias",
        "head.original_module.dense.bias",
        lora_bias=True,
        bias="all",
        modules_to_save=("head",),
    )
    assert (set(keys.down), set(keys.up), set(keys.up_bias)) == ({"fc"}, {"fc"}, {"fc"})
    assert set(keys.replacements) == {
        "fc.bias",
        "norm.bias",
        "head.dense.weight",
        "head.dense.bias",
    }


def test_the_bias_of_an_adapted_layer_may_be_named_either_way() -> None:
    for name in ("fc.base_layer.bias", "fc.bias"):
        assert set(sort(*PAIR, name, bias="lora_only").replacements) == {"fc.bias"}


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        ((*PAIR, "fc.lora_C.weight"), {}, r"1 tensors .* no use: .*fc\.lora_C\.weight"),
        ((*PAIR, "!fc.lora_A.weight"), {}, r"no use: fc\.lora_A\.weight"),
        ((*PAIR, "fc.lora_A.default.weight"), {}, r"no use: .*lora_A\.default\.weight"),
        ((*PAIR, "embed.weight"), {}, r"no use: .*embed\.weight"),
        ((*PAIR, "fc.base_layer.bias"), {}, r"no use: .*fc\.base_layer\.bias"),
        ((*PAIR, "norm.bias"), {}, r"no use: .*norm\.bias"),
        ((*PAIR, "norm.base_layer.bias"), {"bias": "all"}, r"no use: .*norm\.base_layer\.bias"),
        ((*PAIR, "norm.weight"), {"bias": "all"}, r"no use: .*norm\.weight"),
        ((*PAIR, "fc.lora_B.bias"), {"bias": "all"}, r"no use: .*fc\.lora_B\.bias"),
        ((*PAIR, "x.original_module.bias"), {"bias": "lora_only"}, "x.original_module"),
        ((*PAIR, "norm.bias"), {"bias": "lora_only"}, r"no use: .*norm\.bias"),
        (
            (*PAIR, "fc.bias", "fc.base_layer.bias"),
            {"bias": "all"},
            r"no use: .*fc\.base_layer\.bias",
        ),
        ((PAIR[0],), {}, r"half of a pair.*: fc\.lora_A\.weight"),
        ((PAIR[1],), {}, r"half of a pair.*: fc\.lora_B\.weight"),
        ((), {}, "nothing is adapted"),
        (("fc.bias",), {"bias": "all"}, "nothing is adapted"),
        (PAIR, {"lora_bias": True}, r"lora_B\.bias is not found.*at: fc"),
        ((*PAIR, "x.lora_B.bias"), {"lora_bias": True}, r"lora_B\.bias .*at: fc, x"),
        (PAIR, {"modules_to_save": ("head",)}, "modules_to_save names 'head'"),
        (
            (*PAIR, "fc.weight"),
            {"modules_to_save": ("fc",)},
            "both adapted and stored whole by modules_to_save: fc",
        ),
        ((*PAIR, "x.base_layer.lora_A.weight"), {}, "nested in another .target_parameters."),
        ((*PAIR, "emb.lora_embedding_A"), {}, "emb.lora_embedding_A' is an embedding's adapter"),
        ((*PAIR, "fc.lora_magnitude_vector"), {}, "fc.lora_magnitude_vector' is DoRA"),
        ((*PAIR, "fc.lora_E"), {}, "fc.lora_E' is AdaLoRA"),
        ((*PAIR, "e.token_adapter.trainable_tokens_delta"), {}, "is trainable tokens"),
    ],
)
def test_a_key_without_a_use_is_refused_by_name(
    names: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=rf"^adapter\.safetensors: .*{message}"):
        sort(*names, **fields)


def test_many_keys_without_a_use_are_shortened() -> None:
    with pytest.raises(AdapterError, match=r"12 tensors .*, and 2 more"):
        sort(*PAIR, *[f"x{i}.weight" for i in range(12)])


def test_a_head_that_peft_lists_for_the_task_may_be_missing() -> None:
    names = (*PAIR, "classifier.weight")
    sort(*names, modules_to_save=("classifier", "score"), optional_heads=HEADS)
    with pytest.raises(AdapterError, match="'score'"):
        sort(*names, modules_to_save=("classifier", "score"))


@pytest.mark.parametrize(
    ("path", "modules", "expected"),
    [
        ("head", ["head"], "head"),
        ("model.head.dense", ["head"], "model.head"),
        ("lm_head", ["head"], "lm_head"),
        ("headless", ["head"], None),
        ("a.b.c", ["a.b", "c"], "a.b"),
        ("fc", [], None),
    ],
)
def test_saved_modules_are_matched_as_peft_does(
    path: str, modules: list[str], expected: str | None
) -> None:
    assert saved_module(path, modules) == expected
