"""Two adapters on one layer, each of which makes its weight anew: what PEFT computes of both."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

import lora_fx
from lora_fx import Adapter, AdapterError, fold, inject, load_adapter, text, trace
from lora_fx.passes import StripLora
from lora_fx.reference.reference_run import weight_form
from lora_fx.testing import PEFT_CASES, PEFT_TYPES, SavedCase, relative, save_peft_case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# Of one type, which set_adapter(["a", "b"]) makes active together.
SAME = [
    *("adamss, ragged", "beft, ragged", "boft, linear", "boft, linear butterfly"),
    *("boft, linear blocks", "delora, ragged patterns", "fourierft, ragged", "fourierft, Conv1D"),
    *("frod, ragged", "frod, Conv1D", "gralora, linear", "gralora, Conv1D", "hira, ragged"),
    *("hira, Conv1D", "hira, embedding", "hira, conv1d", "hira, conv2d", "hira, conv3d"),
    *("hra, ragged", "hra, ragged orthogonal", "hra, linear long", "hra, conv2d"),
    "peanut, ragged",
    *("randlora, ragged", "randlora, ragged sparse", "randlora, Conv1D", "shira, ragged"),
    *("supertuning, ragged", "supertuning, ragged lora", "waveft, ragged", "waveft, Conv1D"),
    *("linear lokr", "linear lokr both", "conv1d lokr", "conv2d lokr", "conv2d lokr low"),
    *("linear oft", "linear oft blocks", "linear oft exact", "linear oft shared", "conv2d oft"),
    *("embedding oft", "experts lora", "experts transposed"),
]
# Of two types, in PEFT's mixed model: the second is around the first.
MIXED = [
    ("linear lokr", "linear loha"),
    ("linear loha", "linear lokr"),
    ("linear lokr", "linear lora"),
    ("linear lokr both", "linear oft exact"),
    ("linear oft exact", "linear lokr both"),
    ("linear oft", "linear lokr both"),
    ("shira, ragged", "linear lokr"),
    ("conv2d lokr", "conv2d loha"),
]
# What PEFT computes of two is no function of what the first made.
NEVER = [
    *("boft, conv2d", "deft, ragged", "deft, ragged para", "glora, ragged vectors"),
    *("miss, linear bat", "osf, ragged", "road, linear", "road, linear groups", "lora, kasa"),
]
_HOME = tempfile.TemporaryDirectory()


class Pair(NamedTuple):
    case: SavedCase
    gm: fx.GraphModule
    adapters: list[Adapter]
    directories: list[Path]


@functools.cache
def pair(first: str, second: str) -> Pair:
    """Two adapters of one base, as PEFT saved them."""
    places = [Path(_HOME.name, f"{first} {second}".replace("/", "_"), name) for name in "ab"]
    case = save_peft_case(first, places[0], 3)
    save_peft_case(second, places[1], 7)
    return Pair(
        case,
        trace(case.base, (case.x,)),
        [load_adapter(place, base=case.base, name=place.name) for place in places],
        places,
    )


def of_peft(first: str, second: str) -> Any:
    """PEFT's model with both of them active."""
    case, _, _, places = pair(first, second)
    base: Any = copy.deepcopy(case.base)
    if first == second:
        model: Any = peft.PeftModel.from_pretrained(base, str(places[0]), adapter_name="a")
        model.load_adapter(str(places[1]), adapter_name="b")
        model.base_model.set_adapter(["a", "b"])
        return model.eval()
    if "oft" not in first:
        model = peft.PeftMixedModel.from_pretrained(base, str(places[0]), adapter_name="a")
    else:  # which from_pretrained knows as the second alone
        _, make = (PEFT_CASES | PEFT_TYPES)[first]
        model = peft.get_peft_model(base, make(), adapter_name="a", mixed=True)
        for key, value in load_file(places[0] / "adapter_model.safetensors").items():
            model.get_parameter(key.replace("oft_R.", "oft_R.a.")).data.copy_(value)
    model.load_adapter(str(places[1]), adapter_name="b")
    model.set_adapter(["a", "b"])
    return model.eval()


def louder(gm: fx.GraphModule, adapter: str) -> fx.GraphModule:
    """The same graph, all that is of an adapter a tenth larger."""
    gm = copy.deepcopy(gm)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith(f".{adapter}") and "lora_A" not in name:
                gm.get_parameter(name).mul_(1.1)
                assert parameter.is_floating_point()
    return gm


@torch.no_grad()
def check(first: str, second: str, wanted: torch.Tensor) -> None:
    """Both at once, merged, by weights, and each stripped; each dropped, and each too large."""
    case, gm, adapters, _ = pair(first, second)
    both, x = inject(gm, adapters), case.x
    found = both(x)
    assert relative(found, wanted) <= 1e-6
    form: Any = weight_form(both)
    assert relative(form(x), wanted) <= 1e-6
    folded = fold(both)
    assert relative(folded(x), wanted) <= 1e-6
    assert "lora_" not in text(folded)
    alone = {adapter.name: inject(gm, adapter) for adapter in adapters}
    for name, other in (("a", "b"), ("b", "a")):
        left = StripLora(name)(both).graph_module
        assert text(left) == text(alone[other])
        assert torch.equal(left(x), alone[other](x))
        assert relative(alone[other](x), wanted) > 1e-2  # this one is dropped
        if first != "beft, ragged":  # which has nothing but a bias
            assert relative(louder(both, name)(x), wanted) > 1e-3
    assert text(StripLora()(both).graph_module) == text(gm)


@pytest.mark.parametrize("name", SAME)
def test_two_of_one_type_are_what_peft_runs(name: str) -> None:
    case = pair(name, name).case
    with torch.no_grad():
        check(name, name, of_peft(name, name)(case.x))


@pytest.mark.parametrize("name", ["c3a, linear", "c3a, linear pattern"])
def test_two_that_peft_merges_and_cannot_run(name: str) -> None:
    case, model = pair(name, name).case, of_peft(name, name)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="shape"):
            model(case.x)
        check(name, name, model.merge_and_unload()(case.x))


@pytest.mark.parametrize(("first", "second"), MIXED)
def test_two_types_are_what_peft_runs_in_its_mixed_model(first: str, second: str) -> None:
    case = pair(first, second).case
    with torch.no_grad():
        check(first, second, of_peft(first, second)(case.x))


def test_the_order_of_rotations_is_that_of_peft_and_counts() -> None:
    """PEFT's own merge turns OFT the other way round: what it runs is what is held to."""
    name = "linear oft exact"
    case, gm, (one, two), _ = pair(name, name)
    model = of_peft(name, name)
    with torch.no_grad():
        wanted, merged = model(case.x), model.merge_and_unload()(case.x)
        assert relative(merged, wanted) > 1e-2
        assert relative(inject(gm, [one, two])(case.x), wanted) <= 1e-6
        assert relative(inject(gm, [two, one])(case.x), wanted) > 1e-2
        # Folded, the first is the base that the second acts on.
        assert relative(inject(fold(inject(gm, one)), two)(case.x), merged) <= 1e-6


def test_low_rank_before_a_rotation_is_what_peft_runs_once_it_is_folded(tmp_path: Path) -> None:
    case, gm, (turning, _), places = pair("linear oft exact", "linear oft exact")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "narrow"])
    owner: Any = peft.get_peft_model(copy.deepcopy(case.base), config)
    for name, parameter in owner.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.4)
    owner.save_pretrained(tmp_path / "lora")
    low = load_adapter(tmp_path / "lora", base=case.base, name="low")
    model: Any = peft.PeftMixedModel.from_pretrained(
        copy.deepcopy(case.base), str(tmp_path / "lora"), adapter_name="low"
    )
    model.load_adapter(str(places[0]), adapter_name="b")
    model.eval().set_adapter(["low", "b"])
    with pytest.raises(
        AdapterError, match=r"low stands beside it, out of its reach; give .* before low; or fold"
    ):
        inject(gm, [low, turning])
    with torch.no_grad():
        wanted = model(case.x)  # of (W + B A) R, which is not W R + B A
        assert relative(inject(fold(inject(gm, low)), turning)(case.x), wanted) <= 1e-6
        assert relative(inject(gm, [turning, low])(case.x), wanted) > 1e-2


@pytest.mark.parametrize("name", NEVER)
def test_what_is_no_function_of_the_first_is_refused_and_the_advice_works(name: str) -> None:
    case, gm, adapters, _ = pair(name, name)
    with pytest.raises(AdapterError, match=r"merge them with PEFT \(merge_and_unload\), and trace"):
        inject(gm, adapters)
    for adapter in adapters:
        inject(gm, adapter)
    merged: nn.Module = of_peft(name, name).merge_and_unload()
    with torch.no_grad():
        assert relative(trace(merged, (case.x,))(case.x), merged(case.x)) <= 1e-6
        assert relative(inject(gm, adapters[0])(case.x), merged(case.x)) > 1e-2


def test_every_type_that_makes_weights_anew_is_held_against_peft_or_refused() -> None:
    known = {name.partition(",")[0] for name in (*SAME, *NEVER, "c3a,")}
    low_rank = {"miss", "psoft", "pvera", "tinylora", "unilora", "vblora", "lora", "ln_tuning"}
    assert {name.partition(",")[0] for name in PEFT_TYPES} <= known | low_rank


@pytest.mark.parametrize("name", ["linear lokr", "boft, linear", "linear oft exact"])
def test_onnx_is_what_peft_runs_merged_and_unmerged(name: str, tmp_path: Path) -> None:
    case, gm, adapters, _ = pair(name, name)
    both = inject(gm, adapters)
    with torch.no_grad():
        wanted = of_peft(name, name)(case.x)
        alone = inject(gm, adapters[0])(case.x)
    for number, graph in enumerate((both, fold(both))):
        path = tmp_path / f"{number}.onnx"
        assert lora_fx.to_onnx(graph, path).verified
        session = lora_fx.Session(path)
        (found,) = session.run(dict(zip(_inputs(gm), [case.x], strict=True))).values()
        assert relative(torch.from_numpy(found), wanted) <= 1e-5
        assert relative(torch.from_numpy(found), alone) > 1e-2


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.find_nodes(op="placeholder")]
