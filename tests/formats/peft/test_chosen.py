"""Which of PEFT's types an adapter is written as, and what none of them holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx import Adapter, AdapterError, Update
from lora_fx.adapters.other_updates import AnyUpdate, Scaling, WeightUpdate, added
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.write import choose, contents
from lora_fx.kinds import KINDS
from lora_fx.testing import relative


def low(out: int = 5, into: int = 3, rank: int = 2, **fields: Any) -> Update:
    return Update(torch.randn(rank, into), torch.randn(out, rank), 1.5, **fields)


def table(**fields: Any) -> Update:
    return low(6, 11, stored=SourceRecord({}, {"layer": "embedding"}), **fields)


def parameter(**fields: Any) -> Update:
    return low(stored=SourceRecord({}, {"parameter": "w", "depth": 0}), **fields)


def tokens(*indices: int, **settings: Any) -> AnyUpdate:
    rows = {"trainable_tokens_delta": torch.randn(len(indices), 6)}
    return KINDS["tokens"].read(rows, {"indices": list(indices), **settings})


def ia3() -> AnyUpdate:
    return KINDS["ia3"].read({"ia3_l": torch.ones(5, 1)}, {"feedforward": False})


def loha(**settings: Any) -> AnyUpdate:
    leaves = {"hada_w1_a": (7, 2), "hada_w1_b": (2, 5), "hada_w2_a": (7, 2), "hada_w2_b": (2, 5)}
    tensors = {leaf: torch.randn(shape) for leaf, shape in leaves.items()}
    return KINDS["loha"].read(tensors, {"scale": 0.75, **settings})


def lokr(**settings: Any) -> AnyUpdate:
    tensors = {"lokr_w1": torch.randn(5, 3), "lokr_w2": torch.randn(2, 1)}
    return KINDS["lokr"].read(tensors, {"scale": 0.75, **settings})


def dense() -> AnyUpdate:
    return WeightUpdate("full", added(torch.ones(5, 3)), (5, 3))


CHOSEN: dict[str, tuple[dict[str, AnyUpdate], str]] = {
    "lora": ({"p": low(), "q": low(kind="rslora")}, "LORA"),
    "dora": ({"p": low(magnitude=torch.ones(5), kind="dora")}, "LORA"),
    "a table": ({"p": table(), "q": low()}, "LORA"),
    "tokens": ({"p": tokens(1, 2)}, "TRAINABLE_TOKENS"),
    "tokens beside": ({"p": tokens(1, 2), "q": low()}, "LORA"),
    "loha": ({"p": loha(), "q": loha()}, "LOHA"),
    "ia3": ({"p": ia3()}, "IA3"),
    "plain ones": ({"p": loha(), "q": low()}, "LORA"),
    "loha that lost its tensors": ({"p": low(kind="loha")}, "LORA"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_one_type_holds_all_layers(name: str) -> None:
    updates, expected = CHOSEN[name]
    chosen = choose(Adapter("a", updates))
    assert chosen.type.peft_type == expected
    assert chosen.layers.keys() | chosen.tokens.keys() == updates.keys()


REFUSED: dict[str, tuple[dict[str, AnyUpdate], str]] = {
    "two that are not plain": ({"p": ia3(), "q": low()}, "ia3: p; lora: q"),
    "dense": ({"p": dense(), "q": dense()}, "no one type of PEFT holds full: p, q"),
    "a row": ({"p": low(row=torch.ones(5))}, "no one type of PEFT holds lora: p"),
    "a scaling that was made here": ({"p": Scaling(row=torch.ones(5))}, "holds ia3: p"),
    "lokr of another program": ({"p": lokr()}, "no one type of PEFT holds lokr: p"),
    "tokens beside ia3": ({"p": ia3(), "q": tokens(1)}, r"no trained tokens \(q\) beside IA3"),
    "some dora": ({"p": low(), "q": low(magnitude=torch.ones(5))}, "these have no magnitude: p"),
    "dora and a bias": (
        {"p": low(magnitude=torch.ones(5), bias=torch.ones(5))},
        "no lora_bias beside DoRA: p",
    ),
    "a bias and a table": ({"p": low(bias=torch.ones(5)), "q": table()}, "of embeddings: q"),
    "a parameter and dora": (
        {"p": low(magnitude=torch.ones(5)), "q.w": parameter(magnitude=torch.ones(5))},
        "no DoRA or lora_bias of parameters: q.w",
    ),
    "rank 0": ({"p": low(rank=0)}, "rank 0, which PEFT does not load: p"),
    "a name of PEFT's": ({"a.base_layer.p": low()}, "for itself: a.base_layer.p"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_type_holds_is_refused_by_name(name: str, tmp_path: Path) -> None:
    updates, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        contents(Adapter("a", updates))
    with pytest.raises(AdapterError):
        save_adapter(Adapter("a", updates), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_mixed_plain_kinds_become_lora_of_their_rank(lab: Any) -> None:
    updates = {"fc": low(), "layers.0": loha()}
    save_adapter(Adapter("a", updates), lab.root / "a")
    found = load_adapter(lab.root / "a").updates
    assert (found["fc"].kind, found["layers.0"].kind) == ("lora", "lora")
    model = lab.read("mlp", lab.root / "a").get_base_model()
    for path, update in updates.items():
        layer = model.get_submodule(path)
        wanted = layer.get_delta_weight("default").detach()
        assert relative(update.delta(), wanted) <= 1e-6
        assert relative(1.1 * update.delta(), wanted) > 1e-2


def test_a_table_and_a_convolution_that_were_made_here_load_into_peft(tmp_path: Path) -> None:
    conv = Update(torch.randn(2, 4, 3), torch.randn(5, 2), 0.5)
    updates: dict[str, Update] = {"0": table(), "1": conv}
    save_adapter(Adapter("a", updates), tmp_path / "a")
    model = nn.Sequential(nn.Embedding(11, 6), nn.Conv1d(4, 5, 3))
    before = {"0": model[0].weight.detach().T.clone(), "1": model[1].weight.detach().clone()}
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload()
    after = {"0": merged[0].weight.detach().T, "1": merged[1].weight.detach()}
    for path, update in updates.items():
        assert relative(update.weight(before[path]), after[path]) <= 1e-6
        assert relative(before[path], after[path]) > 1e-2


def test_what_peft_ties_itself_is_not_written(tmp_path: Path) -> None:
    updates = {"e": tokens(1, 2), "head": tokens(1, 2, head=True, tied="e"), "fc": low()}
    chosen = choose(Adapter("a", updates))
    assert set(chosen.tokens) == {"e"}


def test_a_stored_alpha_of_another_program_is_in_the_config_alone(tmp_path: Path) -> None:
    update = loha(r=2)
    assert update.stored is not None
    stored = replace(update.stored, tensors={**update.stored.tensors, "alpha": torch.tensor(1.5)})
    save_adapter(Adapter("a", {"fc": replace(update, stored=stored)}), tmp_path / "a")
    found = load_adapter(tmp_path / "a").updates["fc"]
    assert found.stored is not None
    assert "alpha" not in found.stored.tensors
    assert torch.equal(found.delta(), update.delta())
