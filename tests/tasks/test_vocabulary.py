"""A base of fewer tokens than its adapter, and an adapter that lies beside its base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.numerics import compare
from lora_fx.tasks import load
from lora_fx.tasks.vocabulary import fit_vocabulary

IDS = torch.tensor([[1, 41, 43, 7, 2]])
TASK = "text-generation"


def base_of(tied: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A base of 40 tokens, an adapter of 44, and PEFT's logits."""
    base = base_of(request.param)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(44, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        base.model.embed_tokens.weight[40:] += 1
    tuned.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    want = tuned(input_ids=IDS, use_cache=False).logits.detach()
    return tmp_path / "base", tmp_path / "a", want


def test_a_directory_gets_the_tokens_of_its_adapter(
    places: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    base, path, want = places
    [part] = load(base, TASK, adapters=[path])
    adapter = lora_fx.load_adapter(path, base=part.model)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    gm = part.traced()
    # The call of the task takes positions, if the graph does.
    names = {node.name for node in gm.graph.nodes if node.op == "placeholder"}
    more = {"position_ids": torch.arange(5)[None]} if "position_ids" in names else {}

    def logits(graph: Any) -> torch.Tensor:
        found = graph(**inputs, **more)
        return found["logits"] if isinstance(found, dict) else found[0]

    assert compare(logits(lora_fx.inject(gm, adapter)), want).ok
    without = lora_fx.Adapter("b", adapter.updates)
    assert not compare(logits(lora_fx.inject(gm, without)), want).ok  # the control
    out = tmp_path / "out"
    out.mkdir()
    assert part.write_beside is not None
    part.write_beside(out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 44


def test_without_the_adapter_it_keeps_its_own(places: tuple[Path, Path, torch.Tensor]) -> None:
    [part] = load(places[0], TASK)
    assert part.model.config.vocab_size == 40


def test_a_head_that_nobody_brings_would_be_random() -> None:
    model = base_of(tied=False)
    lacking = fit_vocabulary(model, {"model.embed_tokens.weight": (44, 8)})
    assert lacking == ["lm_head.weight"]
    tied = base_of(tied=True)
    assert fit_vocabulary(tied, {"model.embed_tokens.weight": (36, 8)}) == []
    assert (tied.lm_head.weight.shape, tied.config.vocab_size) == ((36, 8), 36)


@pytest.mark.parametrize("shape", [(40, 8), (44, 9), (44,)])
def test_what_is_no_table_of_more_tokens_changes_nothing(shape: tuple[int, ...]) -> None:
    model = base_of(tied=False)
    assert fit_vocabulary(model, {"model.embed_tokens.weight": shape}) == []
    assert fit_vocabulary(nn.Linear(3, 3), {"weight": shape}) == []
    assert model.lm_head.weight.shape == (40, 8)


def test_a_model_that_cannot_grow_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    with pytest.raises(LoraFxError, match="brings 44 tokens, the model has 40"):
        fit_vocabulary(Stubborn(), {"table.weight": (44, 8)})


def test_an_adapter_beside_its_base_is_put_on_it_once(tmp_path: Path) -> None:
    base = base_of(tied=False)
    base.save_pretrained(tmp_path / "both")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path / "both"))
    with pytest.raises(LoraFxError, match="a model with an adapter beside it: name it as"):
        load(tmp_path / "both", TASK)
    [part] = load(tmp_path / "both", TASK, adapters=[tmp_path / "both"])
    found = {name.removeprefix("model."): p for name, p in part.model.named_parameters()}
    want = {name.removeprefix("model."): p for name, p in base.named_parameters()}
    assert not any("lora" in name for name in found)
    assert {name.removeprefix("model.") for name in found} == set(want)
