"""Each set of words is told once: tables, signatures and the command line agree with the types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx import choices
from lora_fx.adapters.merging import WAYS
from lora_fx.choices import check_choice, takes, words
from lora_fx.cli.model_source import DTYPES
from lora_fx.cli.parts import SWAPPING
from lora_fx.errors import AdapterError, ExportError, LoraFxError, PassError
from lora_fx.export.quantization.schemes import scheme_wanted
from lora_fx.formats import FORMATS
from lora_fx.tasks import TASKS
from lora_fx.testing import make_adapter

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


GM = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(3, 5)), (torch.ones(4, 3),))
FRENCH = make_adapter({"0": (5, 3)})
TUNED = lora_fx.inject(GM, FRENCH)
# What is called -> its parameters, and what they are not.
WRONG: list[tuple[Callable[..., Any], dict[str, object]]] = [
    (lora_fx.explain, {"gm": None}),
    (lora_fx.text, {"gm": 3}),
    (lora_fx.adapter_from, {"gm": "x"}),
    (lora_fx.load_adapter, {"path": None}),
    (partial(lora_fx.load_adapter, "nowhere"), {"format": []}),
    (partial(lora_fx.save_adapter, FRENCH), {"path": 3}),
    (partial(lora_fx.save_adapter, path="nowhere"), {"adapter": "french"}),
    (lora_fx.LoraConfig, {"rank_pattern": 3, "alpha_pattern": ["x"]}),
    (partial(lora_fx.Adapter, "french"), {"updates": [3]}),
    (partial(lora_fx.Update, up=torch.ones(5, 2), scale=1.0), {"down": None}),
    (partial(lora_fx.combine, [(FRENCH, 1.0)]), {"how": []}),
    (partial(lora_fx.to_onnx, GM), {"path": None}),
    (partial(lora_fx.to_onnx, GM, "never.onnx"), {"progress": 3, "report": []}),
    (partial(lora_fx.to_onnx, GM, "never.onnx"), {"external_data_above": "x"}),
    (partial(lora_fx.export_adapter, FRENCH, "m.onnx"), {"out_path": None}),
    (lora_fx.Session, {"path": 3}),
    (partial(lora_fx.export.slots_for, GM), {"adapters": 3}),
    (partial(lora_fx.export.add_lora, "m.onnx"), {"out_path": None}),
    (partial(lora_fx.export.merge_onnx, "m.onnx", FRENCH), {"out_path": {}}),
    (partial(lora_fx.export.quantize_onnx, "m.onnx"), {"out_path": 3}),
    (partial(lora_fx.export.join_decoders, "a.onnx", "b.onnx"), {"out_path": 3}),
    (lora_fx.tasks.load, {"directory": None}),
    (lora_fx.passes.Pipeline, {"passes": 3}),
    (lora_fx.passes.sites, {"gm": None}),
]


@pytest.mark.parametrize(
    ("function", "name", "value"), [(f, n, v) for f, given in WRONG for n, v in given.items()]
)
def test_what_is_of_another_type_is_refused_with_the_type(
    function: Callable[..., Any], name: str, value: object
) -> None:
    with pytest.raises(LoraFxError, match=rf"^{name} .*: expected "):
        function(**{name: value})


@pytest.mark.parametrize("function", [lora_fx.text, lora_fx.explain, lora_fx.adapter_from])
def test_who_gives_a_module_for_a_graph_is_told_to_trace_it(function: Callable[..., Any]) -> None:
    with pytest.raises(LoraFxError, match=r"expected GraphModule: trace the model first, gm = "):
        function(torch.nn.Linear(3, 5))


def test_who_does_not_fail_is_not_asked_and_who_was_given_what_it_takes_fails_as_it_does() -> None:
    def divided(
        sizes: Sequence[int], names: Mapping[str, Path] | None = None, whole: bool = True
    ) -> list[float]:
        return [size / len(sizes[0:]) for size in sizes] if whole else [1 / sizes[9]]

    halved: Callable[..., Any] = takes(ExportError)(divided)
    assert halved((2, np.int64(4)), {"x": Path()}) == [1, 2]
    assert halved([0.5]) == [0.5]
    for wrong in ("ab", ["a"], {1: 2}, 3, None):
        with pytest.raises(ExportError, match=r"^sizes is .*: expected Sequence\[int\]$"):
            halved(wrong)
    with pytest.raises(ExportError, match=r"^names is .*: expected Mapping\[str, Path\] \| None$"):
        halved([1], {"x": 3}, whole=False)
    with pytest.raises(IndexError):
        halved([1], {"x": Path()}, whole=np.False_)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lora_fx.LoraConfig(rank=4), r"^LoraConfig: got an .* 'rank': give .*: r, alpha, "),
        (lambda: lora_fx.compare(torch.ones(2)), r"^compare: missing .* 'expected': give what it "),
        (lambda: lora_fx.trace(GM, (), {}, None), r"^trace: too many positional arguments: give "),
    ],
)
def test_what_nothing_takes_is_told_with_what_it_takes(
    call: Callable[[], object], says: str
) -> None:
    with pytest.raises(LoraFxError, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lora_fx.inject(GM, lora_fx.Adapter("a", {"0": update(scale="4")})),
         r"^Update\.scale is '4': expected float$"),
        (lambda: lora_fx.Adapter("a", {"0": "x"}), r"^updates is .*: expected Mapping"),
        (lambda: lora_fx.passes.FoldLora(np.ones(2))(GM), r"^FoldLora\.chains is .*expected bool$"),
        (lambda: lora_fx.passes.ChooseForm(form=True)(TUNED), r"^ChooseForm\.form is True"),
    ],
)  # fmt: skip
def test_what_fails_over_a_field_of_a_value_is_told_by_the_field(
    call: Callable[[], object], says: str
) -> None:
    lora_fx.inject(GM, lora_fx.Adapter("a", {"0": update(scale=4)}))
    with pytest.raises(LoraFxError, match=says):
        call()


def update(scale: Any) -> lora_fx.Update:
    return lora_fx.Update(torch.ones(2, 3), torch.ones(5, 2), scale)


TORCHS = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@pytest.mark.parametrize("short", [MemoryError(), RuntimeError(TORCHS)])
def test_memory_that_is_short_is_told_by_a_typed_error(
    short: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever asks for memory: a tensor that `compare` was given is none of another kind then."""

    def refusing(*_: Any, **__: Any) -> None:
        raise short

    gm = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(3, 5)), (torch.ones(2, 3),))
    adapter, ones = make_adapter({"0": (5, 3)}), torch.ones(2)
    lora_fx.inject(gm, adapter)  # the control
    for name in ("detach", "reshape", "to"):
        monkeypatch.setattr(torch.Tensor, name, refusing)
    with pytest.raises(LoraFxError, match=r"^compare: there is not enough memory: free some"):
        lora_fx.compare(ones, ones)
    with pytest.raises(PassError, match="not enough memory: free some"):
        lora_fx.inject(gm, adapter)
