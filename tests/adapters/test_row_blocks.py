"""Updates of rows: cut, joined, and swapped by halves, as the weights that they give."""

from __future__ import annotations

import pytest
import torch

from lora_fx.adapters.other_updates import Scaling
from lora_fx.adapters.row_blocks import Block, cut, joined, swapped
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.kinds.dora import over_inputs
from lora_fx.testing import relative
from lora_fx.testing.updates import update_of

KINDS = ["lora", "rslora", "lora_bias", "dora", "loha", "lokr", "full", "ia3_in"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_gives_the_rows_that_the_whole_gives(kind: str) -> None:
    update, weight = update_of(kind, (6, 4)), torch.randn(6, 4)
    want = update.weight(weight)
    part = cut(update, range(1, 5))
    assert relative(part.weight(weight[1:5]), want[1:5]) < 1e-6
    assert relative(part.weight(weight[1:5]), want[:4]) > 1e-2
    if update.bias is not None:
        shift, whole = part.shift(lambda: None), update.shift(lambda: None)
        assert shift is not None
        assert whole is not None
        assert torch.equal(shift, whole[1:5])


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", ["lora", "dora"])
def test_joined_updates_give_each_its_rows(first: str, second: str) -> None:
    one, two, weight = update_of(first, (4, 6)), update_of(second, (2, 6)), torch.randn(8, 6)
    whole = joined([Block(one, range(4)), Block(two, range(6, 8))], (8, 6))
    want = torch.cat([one.weight(weight[:4]), weight[4:6], two.weight(weight[6:])])
    assert relative(whole.weight(weight), want) < 1e-6
    assert isinstance(whole, Update) == (
        second == "lora" and first in ("lora", "rslora", "lora_bias", "loha")
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "ia3_in"])
def test_halves_are_swapped(kind: str) -> None:
    update, weight = update_of(kind, (6, 4)), torch.randn(6, 4)
    want = update.weight(weight.roll(3, 0)).roll(3, 0)
    assert relative(swapped(update).weight(weight), want) < 1e-6
    assert relative(weight if kind == "ia3_in" else update.weight(weight), want) > 1e-3


def test_experts_of_different_ranks_are_one_update() -> None:
    pairs = {e: Update(torch.randn(r, 4), torch.randn(2, r), 0.5) for e, r in ((0, 1), (2, 3))}
    blocks = [Block(pair, range(e, e + 2), e) for e, pair in pairs.items()]
    weight = torch.randn(3, 5, 4)
    want = weight.clone()
    for expert, pair in pairs.items():
        want[expert, expert : expert + 2] += pair.delta()
    assert relative(joined(blocks, (3, 5, 4)).weight(weight), want) < 1e-6


def test_an_update_that_measures_all_rows_is_not_cut() -> None:
    whole = over_inputs(update_of("lora", (6, 4)), {"dora_scale": torch.rand(1, 4)}, (6, 4))
    with pytest.raises(AdapterError, match="'dora' is of several layers"):
        cut(whole, range(1, 5))
    weight = torch.randn(8, 4)
    alone = joined([Block(whole, range(1, 7))], (8, 4)).weight(weight)
    want = torch.cat([weight[:1], whole.weight(weight[1:7]), weight[7:]])
    assert relative(alone, want) < 1e-6
    assert relative(weight, want) > 1e-2


def test_what_has_no_form_is_refused() -> None:
    dora = Block(update_of("dora", (2, 4)), range(2), 1)
    with pytest.raises(AdapterError, match="'dora' of one expert of several"):
        joined([dora], (3, 2, 4))
    with pytest.raises(AdapterError, match="scales a bias too"):
        joined([Block(Scaling(row=torch.randn(2)), range(2))], (6, 4))
    with pytest.raises(AdapterError, match="'ia3' is of several layers"):
        cut(Scaling(row=torch.randn(6)), range(2))
