"""Each set of words is told once: tables, signatures and the command line agree with the types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest

import lora_fx
from lora_fx import choices
from lora_fx.adapters.merging import WAYS
from lora_fx.choices import check_choice, words
from lora_fx.cli.model_source import DTYPES
from lora_fx.cli.parts import SWAPPING
from lora_fx.errors import AdapterError, ExportError
from lora_fx.export.quantization.schemes import scheme_wanted
from lora_fx.formats import FORMATS
from lora_fx.tasks import TASKS

TABLES = {
    "tasks": (choices.TaskName, TASKS),
    "formats": (choices.Format, FORMATS),
    "saved": (choices.SavedFormat, [n for n, one in FORMATS.items() if one.write is not None]),
    "combine": (choices.Combination, WAYS),
    "dtypes": (choices.FloatType, DTYPES),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_words_of_its_type(name: str) -> None:
    kind, table = TABLES[name]
    assert sorted(get_args(kind)) == sorted(table)


def test_modes_with_slots_are_modes() -> None:
    assert set(SWAPPING) < set(get_args(choices.Mode))
    assert {mode for mode, _ in SWAPPING.values()} == set(get_args(choices.SlotMode))


def test_every_number_of_bits_is_a_scheme() -> None:
    assert [str(scheme_wanted(bits, {})) for bits in get_args(choices.BitsOrFloat)] == [
        "4 bits in blocks of 32", "8 bits in blocks of 32", "nf4 in blocks of 64",
        "fp4 in blocks of 64", "None",
    ]  # fmt: skip


SIGNATURES: list[tuple[Callable[..., Any], str, Any]] = [
    (lora_fx.trace, "frontend", choices.Frontend),
    (lora_fx.to_onnx, "adapters", choices.AdapterMode),
    (lora_fx.to_onnx, "quantize", choices.BitsOrFloat | None),
    (lora_fx.export.add_lora, "adapters", choices.SlotMode),
    (lora_fx.export.quantize_onnx, "bits", choices.Bits),
    (lora_fx.export_adapter, "format", choices.SlotFormat | None),
    (lora_fx.load_adapter, "format", choices.FormatOrAuto),
    (lora_fx.save_adapter, "format", choices.SavedFormat),
    (lora_fx.combine, "how", choices.Combination),
    (lora_fx.tasks.load, "task", choices.TaskName | None),
    (lora_fx.passes.ChooseForm, "target", choices.Target),
    (lora_fx.ExportReport, "mode", choices.Mode),
]


@pytest.mark.parametrize(("function", "name", "kind"), SIGNATURES)
def test_what_is_called_says_the_type(function: Callable[..., Any], name: str, kind: Any) -> None:
    assert get_type_hints(function)[name] == kind


def test_what_is_none_is_refused_with_those_that_there_are() -> None:
    check_choice("frontend ", "auto", choices.Frontend, ExportError)
    with pytest.raises(ExportError, match=r"^bits 5: expected 4, 8, 'nf4' or 'fp4'$"):
        check_choice("bits ", 5, choices.Bits, ExportError)
    with pytest.raises(AdapterError, match="how=True: expected"):
        check_choice("how=", True, choices.Combination, AdapterError)
    with pytest.raises(AdapterError, match=r"^how=\['cat'\]: expected"):
        check_choice("how=", ["cat"], choices.Combination, AdapterError)
    assert words(choices.Bits) == ("4", "8", "nf4", "fp4")
