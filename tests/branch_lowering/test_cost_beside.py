"""What is beside a layer in a graph, against counts made by hand and against those of the forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

import lora_fx
from lora_fx import Adapter
from lora_fx.branch_lowering.cost import PANEL, Cost
from lora_fx.branch_lowering.cost_beside import cost_beside, cost_of_slot
from lora_fx.branch_lowering.selection import FACTORED, TOKENS, choices
from lora_fx.layers.sites import sites
from lora_fx.testing import UPDATES, Attention, Between, make_adapter, update_of


def injected(
    model: nn.Module, *x: torch.Tensor, adapter: Adapter, **options: Any
) -> fx.GraphModule:
    return lora_fx.inject(lora_fx.trace(model.eval(), x, **options), adapter)


def costs(gm: fx.GraphModule, slots: bool = False) -> list[Cost | None]:
    return [cost_beside(gm, site, slots) for site in sites(gm)]


@pytest.mark.parametrize("biased", [True, False])
def test_two_factors_cost_what_the_form_says(biased: bool) -> None:
    model = nn.Sequential(nn.Linear(48, 32, bias=biased))
    gm = injected(model, torch.randn(3, 5, 48), adapter=make_adapter({"0": (32, 48)}, rank=20))
    ((member,),) = [group.members for group in choices(gm)]
    assert costs(gm) == costs(gm, slots=True) == [member.beyond_merged(FACTORED)]
    wider = injected(model, torch.randn(3, 5, 48), adapter=make_adapter({"0": (32, 48)}, rank=40))
    assert costs(wider) != costs(gm), "the control: another rank"


def test_a_convolution_costs_that_of_low_rank_and_that_of_one_place() -> None:
    (n, c, o, r, k), (size, places) = (2, 4, 6, 3, 3), (9 * 9, 7 * 7)
    model, x = Between(nn.Conv2d(c, o, k)), torch.randn(n, c, 9, 9)
    adapter = make_adapter({"layer": (o, c, k, k)}, rank=r)
    kernel = r * c * k * k
    down = Cost(2 * n * places * kernel, 4 * (n * c * size + kernel + n * r * places), 1)
    up = Cost(2 * n * o * places * r, 4 * n * places * (r + o) + 4 * r * o, 1)
    added = Cost(0, 4 * 3 * n * o * places, 1)
    free = {"dynamic_shapes": ({0: Dim("batch")},)}
    for options in ({}, free):
        gm = injected(model, x, adapter=adapter, **options)
        assert costs(gm) == [down + up + added]
    symbolic = lora_fx.trace(nn.Sequential(nn.Conv2d(c, o, k)).eval())
    sized = lora_fx.inject(symbolic, make_adapter({"0": (o, c, k, k)}, rank=r))
    assert costs(sized) == [None], "nobody says how many places there are"


def test_a_transposed_convolution_is_counted_from_what_it_reads() -> None:
    n, c, o, r, k, size = 2, 4, 6, 3, 2, 9 * 9
    gm = injected(
        Between(nn.ConvTranspose2d(c, o, k)), torch.randn(n, c, 9, 9),
        adapter=make_adapter({"layer": (o, c, k, k)}, rank=r),
    )  # fmt: skip
    (found,) = costs(gm)
    assert found is not None
    assert found.flops == 2 * n * size * c * r * k * k + 2 * n * 10 * 10 * r * o


def test_dora_has_two_products_and_four_passes() -> None:
    n, d, o, r = 40, 32, 48, 2
    gm = injected(
        Between(nn.Linear(d, o)), torch.randn(n, d),
        adapter=make_adapter({"layer": (o, d)}, kind="dora"),
    )  # fmt: skip
    (found,) = costs(gm)
    assert found is not None
    assert (found.flops, found.calls) == (2 * n * (d * PANEL + r * o), 6)
    # the bias off, times the gain, both added up: a vector of outputs is read with its rows
    assert found.bytes == 4 * (d * r + n * (d + r) + r * o + n * (r + o) + (2 + 2 + 3 + 3) * n * o)


def test_a_table_costs_the_rows_that_are_looked_up() -> None:
    n, o, r = 5, 32, 16
    ids = torch.arange(n)[None]
    for table in (7, 70):
        gm = injected(
            Between(nn.Embedding(table, o)), ids,
            adapter=make_adapter({"layer": (o, table)}, rank=r),
        )  # fmt: skip
        ((cost,),) = [costs(gm)]
        assert cost == Cost(2 * n * r * o, 4 * (2 * n * r + n * (r + o) + r * o + 3 * n * o), 3)


@pytest.mark.parametrize("kind", UPDATES)
def test_what_is_made_of_constants_alone_costs_nothing(kind: str) -> None:
    update = update_of(kind, (6, 8))
    out, into = (size or own for size, own in zip(update.shape, (6, 8), strict=True))
    gm = injected(
        Between(nn.Linear(into, out)), torch.randn(5, into), adapter=Adapter("a", {"layer": update})
    )
    (found,), (given,) = costs(gm), costs(gm, slots=True)
    assert found is not None
    assert given is not None
    is_made = kind in ("glora", "lokr", "oft", "tokens")
    assert (found == Cost()) is is_made
    assert given.calls > found.calls if is_made else given == found or kind == "full"


def test_a_part_of_a_packed_weight_and_a_product_with_labels_have_a_cost() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bld,dk->bkl", x, self.w)

    packed = injected(
        Attention(8), torch.randn(2, 3, 8), adapter=make_adapter({"layer": (24, 8)}, rank=2)
    )
    heads = injected(Heads(), torch.randn(2, 3, 8), adapter=make_adapter({"w": (12, 8)}, rank=2))
    for gm in (packed, heads):
        (found,) = [cost for site in sites(gm) if (cost := cost_beside(gm, site)) and cost.calls]
        assert found.flops > 0


class Batched(nn.Module):
    """One matrix for each of a batch, the sizes read off x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.w.expand(x.shape[0], -1, -1))


def test_sizes_that_are_not_known_are_assumed_where_they_may_be() -> None:
    free, x = {"dynamic_shapes": ({0: Dim("batch"), 1: Dim("rows")},)}, torch.randn(2, 3, 8)
    adapter = make_adapter({"w": (32, 8)}, rank=16)
    (found,) = costs(injected(Batched(), x, adapter=adapter, **free))
    assert found is not None
    assert found.flops == 2 * TOKENS * 16 * (8 + 32)
    symbolic = lora_fx.inject(lora_fx.trace(Batched().eval()), adapter)
    assert costs(symbolic) == [None], "a batch of matrices wants three axes"


def test_a_whole_weight_that_is_given_is_laid_out_and_a_table_is_not() -> None:
    for layer, x, bytes in (
        (nn.Linear(8, 6), torch.randn(2, 8), 4 * 2 * 48),
        (nn.Conv1d(8, 6, 2, groups=2), torch.randn(2, 8, 5), 4 * 2 * 48),
        (nn.Embedding(8, 6), torch.tensor([1, 2]), 0),
    ):
        (site,) = sites(lora_fx.trace(Between(layer).eval(), (x,)))
        assert cost_of_slot(site).bytes == bytes
