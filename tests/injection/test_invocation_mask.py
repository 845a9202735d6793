"""The mask of an activated adapter, against a search in Python; and what has no such mask."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_fx import Adapter, AdapterError, Update, adapter_from, fold, inject, text, trace
from lora_fx.adapters.updates import activated
from lora_fx.injection.branches import branches
from lora_fx.injection.invocation_mask import active, invocations_in
from lora_fx.passes import ChooseForm, StripLora
from lora_fx.testing import make_adapter, relative, same_adapter

IDS = torch.tensor([[5, 1, 7, 3, 1, 7], [7, 3, 7, 3, 2, 2], [1, 2, 4, 5, 6, 7]])
TOKENS = (7, 3)
STARTS = (2, 2, None)  # of the last invocation in each row


class Model(nn.Module):
    """A table, two layers and a head over tokens; a layer over the mean of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.wide = nn.Linear(4, 6)
        self.narrow = nn.Linear(6, 5, bias=False)
        self.pooled = nn.Linear(5, 3)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.narrow(torch.tanh(self.wide(self.table(input_ids))))
        return {"tokens": hidden, "pooled": self.pooled(hidden.mean(1))}


def graph(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    shapes: Any = {"input_ids": {0: "batch", 1: "length"}}
    model = (model or Model()).eval()
    return trace(model, (), {"input_ids": IDS}, dynamic_shapes=shapes, frontend="export")


def adapter(tokens: Sequence[int] = TOKENS, name: str = "french", **shapes: Any) -> Adapter:
    plain = make_adapter(shapes or {"wide": (6, 4), "narrow": (5, 6)}, name=name)
    updates: dict[str, Any] = dict(plain.updates)
    return Adapter(name, {path: activated(u, tokens) for path, u in updates.items()})


def last(row: Sequence[int], tokens: Sequence[int]) -> int | None:
    found = [i for i in range(len(row)) if list(row[i : i + len(tokens)]) == list(tokens)]
    return found[-1] if found else None


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=3),
    st.integers(1, 5),
    st.lists(st.integers(0, 2), min_size=0, max_size=4),
)
def test_it_is_ones_from_the_last_invocation_on(
    rows: list[list[int]], length: int, tokens: list[int]
) -> None:
    ids = torch.tensor(rows)[:, :length]
    mask = active(ids, torch.tensor(tokens, dtype=torch.int64), torch.float16)
    assert (mask.shape, mask.dtype) == ((*ids.shape, 1), torch.float16)
    for row, found in zip(ids.tolist(), mask[..., 0], strict=True):
        start = last(row, tokens) if tokens else 0
        wanted = [float(start is not None and place >= start) for place in range(length)]
        assert found.tolist() == wanted


@torch.no_grad()
def test_before_it_the_base_and_from_it_on_the_adapter() -> None:
    gm = graph()
    injected, plain = inject(gm, adapter()), inject(gm, adapter(()))
    base, everywhere, found = (g(input_ids=IDS)["tokens"] for g in (gm, plain, injected))
    for row, start in enumerate(STARTS):
        start = IDS.shape[1] if start is None else start
        assert torch.equal(found[row, :start], base[row, :start])
        assert relative(found[row, start:], everywhere[row, start:]) <= 1e-6
    assert relative(found[0, 2:], base[0, 2:]) > 1e-2
    other = inject(gm, adapter((3,)))(input_ids=IDS)["tokens"]
    assert relative(other, found) > 1e-2
    longer = torch.cat([IDS, IDS, IDS], 1)[:2, 1:]
    assert torch.equal(
        injected(input_ids=longer)["tokens"][0, :13], gm(input_ids=longer)["tokens"][0, :13]
    )


def test_one_mask_serves_all_layers_and_is_read_back_and_stripped() -> None:
    gm = graph()
    injected = inject(gm, adapter())
    assert text(injected).count(" = cumsum(") == 3
    assert invocations_in(injected) == [TOKENS]
    assert [branch.mask is not None for branch in branches(injected)] == [True, True]
    found = adapter_from(injected)
    assert {update.invocation for update in found.updates.values()} == {TOKENS}
    again = inject(gm, found)
    with torch.no_grad():
        assert relative(again(input_ids=IDS)["tokens"], injected(input_ids=IDS)["tokens"]) <= 1e-6
    same_adapter(adapter_from(copy.deepcopy(injected)), found)
    stripped = StripLora()(injected).graph_module
    assert text(stripped) == text(gm)


@torch.no_grad()
def test_several_act_each_from_its_own() -> None:
    gm = graph()
    one, other = adapter(), adapter((1,), "german", wide=(6, 4))
    both = inject(gm, [one, other, make_adapter({"narrow": (5, 6)}, name="plain")])
    assert invocations_in(both) == [TOKENS, (1,)]
    alone = StripLora("french")(StripLora("plain")(both).graph_module).graph_module
    wanted = inject(gm, other)(input_ids=IDS)["tokens"]
    assert torch.equal(alone(input_ids=IDS)["tokens"], wanted)
    assert relative(both(input_ids=IDS)["tokens"], wanted) > 1e-2


@torch.no_grad()
def test_it_stays_beside_its_layer_whatever_is_folded_or_chosen() -> None:
    injected = inject(graph(), adapter())
    wanted = injected(input_ids=IDS)["tokens"]
    for changed in (fold(injected), ChooseForm()(injected).graph_module):
        assert len(branches(changed)) == 2
        assert relative(changed(input_ids=IDS)["tokens"], wanted) <= 1e-6


@torch.no_grad()
def test_a_bias_of_the_adapter_acts_where_it_does() -> None:
    update: Any = adapter(wide=(6, 4)).updates["wide"]
    biased = Update(update.down, update.up, update.scale, "alora", torch.ones(6), invocation=TOKENS)
    gm = graph()
    found = inject(gm, Adapter("a", {"wide": biased}))(input_ids=IDS)["tokens"]
    base = gm(input_ids=IDS)["tokens"]
    assert torch.equal(found[0, :2], base[0, :2])
    assert torch.equal(found[2], base[2])
    assert relative(found, inject(gm, adapter(wide=(6, 4)))(input_ids=IDS)["tokens"]) > 1e-2


class Flat(Model):
    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.narrow(torch.tanh(self.wide(self.table(input_ids).flatten(0, 1))))
        return {"tokens": rows.unflatten(0, input_ids.shape)}


@torch.no_grad()
def test_a_layer_may_read_the_tokens_as_rows() -> None:
    wanted, found = (inject(graph(model), adapter()) for model in (Model(), Flat()))
    found.load_state_dict({k: wanted.state_dict()[k] for k in found.state_dict()})
    assert [branch.mask is not None for branch in branches(found)] == [True, True]
    tokens = wanted(input_ids=IDS)["tokens"]
    assert relative(found(input_ids=IDS)["tokens"], tokens) <= 1e-6
    assert relative(inject(graph(Flat()), adapter((1,)))(input_ids=IDS)["tokens"], tokens) > 1e-2


class Renamed(Model):
    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().forward(tokens)


class Cached(Model):
    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, past_key: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        found = super().forward(input_ids)
        return {"tokens": torch.cat([past_key, found["tokens"]], 1)}


class TestRefused:
    def test_a_layer_that_reads_no_row_for_each_token(self) -> None:
        with pytest.raises(AdapterError, match=r"pooled: .* does not read one row for each token"):
            inject(graph(), adapter(pooled=(3, 5)))

    @pytest.mark.parametrize("path", ["wide", "pooled"])
    def test_a_layer_of_which_nobody_knows_how_many_rows_it_reads(self, path: str) -> None:
        gm = trace(Model().eval(), (), {"input_ids": IDS}, frontend="symbolic")
        with pytest.raises(AdapterError, match=r'adapter french: .*and frontend="export"'):
            inject(gm, adapter(**{path: {"wide": (6, 4), "pooled": (3, 5)}[path]}))

    def test_a_table(self) -> None:
        with pytest.raises(AdapterError, match=r"table: .* \(embedding\) does not read one row"):
            inject(graph(), adapter(table=(4, 9)))

    def test_a_graph_without_ids(self) -> None:
        gm = trace(Renamed().eval(), (IDS,), frontend="export")
        with pytest.raises(AdapterError, match="no input input_ids to find them in, but tokens"):
            inject(gm, adapter())

    def test_a_decoder_with_a_cache(self) -> None:
        example = {"input_ids": IDS, "past_key": torch.randn(3, 4, 5)}
        gm = trace(Cached().eval(), (), example, frontend="export")
        with pytest.raises(
            AdapterError, match=r"not told which tokens its past holds; .*--task text-gen"
        ):
            inject(gm, adapter())

    def test_one_weight(self) -> None:
        update = adapter().updates["wide"]
        with pytest.raises(AdapterError, match="no one weight says it"):
            update.weight(torch.zeros(6, 4))
        assert update.measures()["invocation"] == [7, 3]
