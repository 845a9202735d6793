"""What formats of bare matrices refuse, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError
from lora_fx.formats.limits import FOREIGN, check_matrices_only, refuse_foreign

PATH = Path("out.safetensors")
PLAIN = Update(torch.ones(2, 3), torch.ones(5, 2), 1.5)
REFUSED = {
    "no update": (Adapter("empty", {}), "the adapter empty has no update"),
    "kind": (Adapter("a", {"fc": replace(PLAIN, kind="dora")}), "other kinds than LoRA: fc;"),
    "scale": (Adapter("a", {"fc": replace(PLAIN, scale=float("nan"))}), "no finite number: fc;"),
    "rank 0": (
        Adapter("a", {"fc": Update(torch.ones(0, 3), torch.ones(5, 0), 1.0)}),
        "updates of rank 0: fc;",
    ),
    "bias": (
        Adapter("a", {"fc": PLAIN, "up": replace(PLAIN, bias=torch.ones(5))}),
        r"biases of up-projections \(lora_bias\): up;",
    ),
    "replaced": (
        Adapter("a", {"fc": PLAIN}, {"head.weight": torch.ones(2)}),
        r"replaced parameters: head\.weight;",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_more_than_matrices_is_refused(case: str) -> None:
    adapter, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message):
        check_matrices_only(adapter, PATH, "the format", adapter.replacements)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_matrices_are_not_refused(kind: str) -> None:
    check_matrices_only(Adapter("a", {"fc": replace(PLAIN, kind=kind)}), PATH, "the format", ())


@pytest.mark.parametrize("word", FOREIGN)
def test_a_feature_is_named_with_its_tensor(word: str) -> None:
    with pytest.raises(AdapterError, match=f"tensor 'fc.{word}' is .*, which is not supported"):
        refuse_foreign(PATH, f"fc.{word}", word)


@pytest.mark.parametrize("ending", ["lora_down.weight", "lora_A.weight", "alpha", "", "weight"])
def test_a_name_of_lora_is_not_refused(ending: str) -> None:
    refuse_foreign(PATH, "hada_diff.x", ending)
