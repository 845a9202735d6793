"""Keys of a PEFT file: each is used, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.peft.keys import PREFIX, ClassifiedTensors, sort_peft
from lora_fx.formats.peft.types import TYPES
from lora_fx.layers.base_layers import BaseLayers

PAIR = ("fc.lora_A.weight", "fc.lora_B.weight")
ROWS = "token_adapter.trainable_tokens_delta"


def sort(
    *names: str, type: str = "LORA", base: BaseLayers | None = None, **fields: Any
) -> ClassifiedTensors:
    alpha: Any = {"LORA": {"lora_alpha": 3}, "LOHA": {"alpha": 3}}.get(type, {})
    config = TYPES[type](r=2, **alpha, **fields)
    tensors = {name if name.startswith("!") else PREFIX + name: torch.ones(1) for name in names}
    own = {key.lstrip("!"): value for key, value in tensors.items()}
    return sort_peft(own, config, BaseLayers({}) if base is None else base)


HEAD = ("head.dense.weight", "head.dense.bias")
BELOW = "e.token_adapter.base_layer.weight"
TIED = ("embed.weight", "head.weight")


@pytest.mark.parametrize(
    ("names", "fields", "replaced"),
    [
        ((*PAIR, "fc.base_layer.bias", "norm.bias", *HEAD, "head.original_module.dense.bias"),
         {"bias": "all", "modules_to_save": ("head",)}, {"fc.bias", "norm.bias", *HEAD}),
        # the bias of an adapted layer may be named either way
        ((*PAIR, "fc.base_layer.bias"), {"bias": "lora_only"}, {"fc.bias"}),
        ((*PAIR, "fc.bias"), {"bias": "lora_only"}, {"fc.bias"}),
        # what lies below tokens, and the tied copy of a saved module
        ((*PAIR, f"e.{ROWS}", BELOW), {"trainable_token_indices": {"e": (1, 2)}}, {"e.weight"}),
        ((*PAIR, *TIED), {"modules_to_save": ("embed",), "ensure_weight_tying": True}, {*TIED}),
    ],
)  # fmt: skip
def test_every_kind_of_key_finds_its_use(
    names: tuple[str, ...], fields: dict[str, Any], replaced: set[str]
) -> None:
    keys = sort(*names, "fc.lora_B.bias", lora_bias=True, **fields)
    assert {path: set(leaves) for path, leaves in keys.layers.items()} == {
        "fc": {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    }
    assert set(keys.tokens) == set(fields.get("trainable_token_indices", ()))
    assert set(keys.replacements) == replaced


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        ((*PAIR, "fc.lora_C.weight"), {}, r"1 tensors .* no known use: .*fc\.lora_C\.weight"),
        ((*PAIR, "!fc.lora_A.weight"), {}, r"no known use: fc\.lora_A\.weight"),
        ((*PAIR, "fc.lora_A.default.weight"), {}, r"no known use: .*lora_A\.default\.weight"),
        ((*PAIR, "embed.weight"), {}, r"no known use: .*embed\.weight"),
        ((*PAIR, "fc.base_layer.bias"), {}, r"no known use: .*fc\.base_layer\.bias"),
        ((*PAIR, "norm.bias"), {}, r"no known use: .*norm\.bias"),
        ((*PAIR, "norm.base_layer.bias"), {"bias": "all"},
         r"no known use: .*norm\.base_layer\.bias"),
        ((*PAIR, "norm.weight"), {"bias": "all"}, r"no known use: .*norm\.weight"),
        ((*PAIR, "fc.lora_B.bias"), {"bias": "all"}, r"no known use: .*fc\.lora_B\.bias"),
        ((*PAIR, "x.original_module.bias"), {"bias": "lora_only"}, "x.original_module"),
        ((*PAIR, "norm.bias"), {"bias": "lora_only"}, r"no known use: .*norm\.bias"),
        ((*PAIR, "fc.bias", "fc.base_layer.bias"), {"bias": "all"},
         r"no known use: .*fc\.base_layer\.bias"),
        ((*PAIR, *[f"x{i}.weight" for i in range(12)]), {}, r"12 tensors .*, and 2 more"),
        ((), {}, "nothing is adapted"),
        (("fc.bias",), {"bias": "all"}, "nothing is adapted"),
        (PAIR, {"modules_to_save": ("head",)}, "modules_to_save names 'head'"),
        ((*PAIR, "fc.weight"), {"modules_to_save": ("fc",)},
         "both adapted and stored whole, by modules_to_save or as tokens: fc"),
        ((*PAIR, "fc.lora_magnitude_vector"), {}, r"no known use: .*fc\.lora_magnitude_vector"),
        ((*PAIR, "fc.lora_E"), {}, r"no known use: .*fc\.lora_E"),
        ((*PAIR, f"e.{ROWS}"), {}, r"no known use: .*e\.token_adapter"),
        (PAIR, {"type": "LOHA"}, r"2 tensors .* one of \.hada_w1_a, .* under LOHA"),
        (("!base_model.vera_A", *PAIR), {}, r"no known use: base_model\.vera_A"),
        ((*PAIR, f"fc.{ROWS}"), {"trainable_token_indices": (1,)},
         "stored whole, by .* tokens: fc"),
        ((*PAIR, "e.token_adapter.base_layer.weight"), {"trainable_token_indices": (1,)},
         "no known use: .*base_layer"),
        ((*PAIR, "head.weight"), {"ensure_weight_tying": True}, r"no known use: .*head\.weight"),
        ((*PAIR, *TIED), {"modules_to_save": ("embed",)}, r"no known use: .*head\.weight"),
    ],
)  # fmt: skip
def test_a_key_without_a_use_is_refused_by_name(
    names: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        sort(*names, **fields)


def test_a_head_that_peft_lists_for_the_task_may_be_missing() -> None:
    names = (*PAIR, "classifier.weight")
    sort(*names, modules_to_save=("classifier", "score"), task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="'score'"):
        sort(*names, modules_to_save=("classifier", "score"))


def test_a_module_that_the_base_has_not_may_be_named_as_stored_whole() -> None:
    fields: dict[str, Any] = {"base": BaseLayers({}, held={"lm_head.weight": torch.ones(1)})}
    sort(*PAIR, modules_to_save=("embed_out", "score"), **fields)
    with pytest.raises(AdapterError, match="modules_to_save names 'head'"):
        sort(*PAIR, modules_to_save=("score", "head"), **fields)


def test_what_all_layers_share_is_told_by_its_whole_key() -> None:
    names = ("fc.vera_lambda_b", "fc.vera_lambda_d", "!base_model.vera_A", "!base_model.vera_B")
    keys = sort(*names, type="VERA")
    assert set(keys.shared) == {"vera_A", "vera_B"}
    assert set(keys.layers["fc"]) == {"vera_lambda_b", "vera_lambda_d"}
