"""What a format cannot hold is named."""

from __future__ import annotations

import pytest
import torch

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Scaling, Update, WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.errors import AdapterError
from lora_fx.formats.expressible import check_held, not_lora

DOWN, UP = torch.ones(2, 3), torch.ones(5, 2)
PROBLEMS: dict[str, tuple[AnyUpdate, str | None]] = {
    "LoRA": (Update(DOWN, UP, 1.5), None),
    "LoHa": (Update(DOWN, UP, 1.5, "loha"), None),
    "DoRA": (Update(DOWN, UP, 1.5, magnitude=torch.ones(5)), None),
    "rank 0": (Update(DOWN[:0], UP[:, :0], 1.5), "updates of rank 0"),
    "infinite": (Update(DOWN, UP, float("inf")), "scales that are no finite number"),
    "bias": (Update(DOWN, UP, 1.5, bias=torch.ones(5)), "biases of up-projections (lora_bias)"),
    "row": (
        Update(DOWN, UP, 1.5, "vera", row=torch.ones(5)),
        "updates of kind 'vera', which scale inputs or outputs",
    ),
    "col": (
        Update(DOWN, UP, 1.5, col=torch.ones(3)),
        "updates of kind 'lora', which scale inputs or outputs",
    ),
    "scaling": (
        Scaling(row=torch.ones(5)),
        "updates of kind 'ia3', which are no product of two factors",
    ),
    "function": (
        WeightUpdate("oft", added(UP), (5, 2)),
        "updates of kind 'oft', which are no product of two factors",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_no_lora_is_told(case: str) -> None:
    update, problem = PROBLEMS[case]
    assert not_lora(update) == problem


def test_the_layers_of_a_problem_are_named_together() -> None:
    good, bad = PROBLEMS["LoRA"][0], PROBLEMS["rank 0"][0]
    check_held(Adapter("a", {"fc": good}), "the format", [], not_lora)
    adapter = Adapter("a", {"fc": good, "up": bad, "out": bad})
    with pytest.raises(AdapterError, match="the format cannot hold updates of rank 0: up, out; "):
        check_held(adapter, "the format", [], not_lora)


def test_replaced_parameters_and_nothing_at_all_are_refused() -> None:
    adapter = Adapter("a", {"fc": PROBLEMS["LoRA"][0]})
    with pytest.raises(AdapterError, match=r"cannot hold replaced parameters: head\.weight; write"):
        check_held(adapter, "the format", ["head.weight"], not_lora)
    with pytest.raises(AdapterError, match="the adapter a has no update to write"):
        check_held(Adapter("a", {}), "the format", [], not_lora)
