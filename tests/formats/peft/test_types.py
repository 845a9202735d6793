"""Trained tokens and adapted embeddings of a model whose head is tied to its table."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import fx

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.types import is_traced
from lora_fx.testing import relative, tiny

IDS = torch.tensor([[1, 5, 7, 2, 9], [5, 6, 1, 4, 3]])
TIED = {"ensure_weight_tying": True}
BOTH = {"embed_tokens": [1, 5], "lm_head": [1, 6]}


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=[*targets], **options)


CASES: dict[str, Callable[[], Any]] = {
    "tokens": lambda: lora("q_proj", trainable_token_indices=[1, 5]),
    "tokens tied on demand": lambda: lora("q_proj", trainable_token_indices=[1, 5], **TIED),
    "tokens of the head": lambda: lora("q_proj", trainable_token_indices={"lm_head": [1, 6]}),
    "tokens of the head beside an adapted table": lambda: lora(
        "q_proj", "embed_tokens", trainable_token_indices={"lm_head": [1, 6]}
    ),
    "tokens of both": lambda: lora("q_proj", trainable_token_indices=BOTH),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[1, 5]),
    "an adapted table": lambda: lora("q_proj", "embed_tokens", **TIED),
    "a saved table": lambda: lora("q_proj", modules_to_save=["embed_tokens"], **TIED),
    "a saved head": lambda: lora("q_proj", modules_to_save=["lm_head"], **TIED),
}


@dataclass(frozen=True)
class Tied:
    """A model with a tied head, its graph, and what PEFT's model of an adapter computes."""

    base: Any
    gm: fx.GraphModule
    directory: Path

    def run(self, directory: Path) -> torch.Tensor:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), str(directory)).eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=IDS).logits
        return logits


@functools.cache
def qwen() -> tuple[Any, fx.GraphModule]:
    """A model and its graph: only read."""
    torch.manual_seed(0)
    base = tiny("Qwen2ForCausalLM", tie_word_embeddings=True, num_hidden_layers=1).eval()
    return base, lora_fx.trace(base, (), {"input_ids": IDS})


@pytest.fixture
def tied(tmp_path: Path) -> Callable[[str], Tied]:
    def make(name: str) -> Tied:
        base, gm = qwen()
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base), CASES[name]())
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(str(tmp_path / "by_peft"))
        return Tied(base, gm, tmp_path / "by_peft")

    return make


@pytest.mark.parametrize("by", ["model", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_the_head_computes_what_peft_s_does(
    name: str, by: str, tied: Callable[[str], Tied], tmp_path: Path
) -> None:
    case = tied(name)
    adapter = load_adapter(case.directory, base=case.base if by == "model" else case.gm)
    wanted = case.run(case.directory)
    with torch.no_grad():
        assert relative(lora_fx.inject(case.gm, adapter)(input_ids=IDS).logits, wanted) <= 1e-6
        assert relative(case.gm(input_ids=IDS).logits, wanted) > 1e-2
    save_adapter(adapter, tmp_path / "written")
    # Of an adapted table PEFT reads the two factors of the head in the table's own memory: the
    # same numbers, added up in another order.
    tolerance = 1e-6 if name == "an adapted table" else 0
    assert relative(case.run(tmp_path / "written"), wanted) <= tolerance


def test_an_adapted_head_that_gets_the_tokens_of_its_table_is_refused(tmp_path: Path) -> None:
    """PEFT adds the head's factors to the rows; one of the two was lost without a word."""
    base, _ = qwen()
    config = lora("lm_head", trainable_token_indices=[1, 5])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"both adapted and stored whole.* as tokens: lm_head"):
        load_adapter(tmp_path, base=base)


def test_a_head_with_tokens_of_its_own_is_left_to_them(tied: Callable[[str], Tied]) -> None:
    case = tied("tokens of both")
    updates = load_adapter(case.directory, base=case.base).updates
    stored = {path: u.stored for path, u in updates.items() if u.kind == "tokens" and u.stored}
    indices = {path: s.settings["indices"] for path, s in stored.items()}
    assert indices == {"model.embed_tokens": [1, 5], "lm_head": [1, 6]}
    assert stored["lm_head"].settings["head"]


LORA = {"peft_type": "LORA"}


@pytest.mark.parametrize(
    ("wanted", "configs"),
    [
        (True, [{"peft_type": "BOFT"}, {"peft_type": "NO_SUCH"}]),
        (
            True,
            [{**LORA, "use_qalora": True}, {**LORA, "kasa_config": {}}],
        ),  # an empty one is not off
        (False, [{"peft_type": "LOHA"}, LORA, {**LORA, "use_qalora": False, "arrow_config": None}]),
        (False, [{"peft_type": 3}, {}]),
    ],
)
def test_a_type_without_a_kind_or_an_option_that_none_computes(
    wanted: bool, configs: list[dict[str, Any]]
) -> None:
    assert [is_traced(fields) for fields in configs] == [wanted] * len(configs)
