"""Where the layers of a PEFT file belong, what only the base can tell, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import AdapterError, Update
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.formats import load_adapter
from lora_fx.formats.peft.wrappers import Home, WrappedTarget, homes_of, places_of, read_experts
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import Computes, save_peft_case

EXPERTS = ("m.experts", "m.experts.base_layer")


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.ones(4, 5, 3))
        self.experts.down = nn.Parameter(torch.ones(4, 3, 5))


def places(
    *paths: str, base: nn.Module | None = None, targets: Any = ()
) -> dict[str, WrappedTarget]:
    return places_of(paths, targets, layers_of(base))


def model() -> nn.Module:
    return nn.ModuleDict({"m": Holder()})


def test_a_module_is_its_own_place() -> None:
    assert places("a.fc") == {"a.fc": WrappedTarget("a.fc", "a.fc")}


def test_the_output_projection_has_the_rank_of_its_attention() -> None:
    found = places("mha", "mha.base_layer.out_proj")
    inner = found["mha.base_layer.out_proj"]
    assert (inner.path, inner.asked) == ("mha.out_proj", "mha")


def test_the_first_parameter_is_the_innermost() -> None:
    found = places(*EXPERTS, base=model(), targets=("experts.down", "experts.up"))
    assert [found[path].path for path in EXPERTS] == ["m.experts.down", "m.experts.up"]
    assert [found[path].depth for path in EXPERTS] == [0, 1]
    assert found[EXPERTS[1]].shape == (4, 5, 3)


def test_a_parameter_called_weight_is_its_module() -> None:
    place = places("a.fc", targets=("a.fc.weight",))["a.fc"]
    assert (place.path, place.asked, place.parameter) == ("a.fc", "a.fc.weight", "weight")


@pytest.mark.parametrize(
    ("paths", "targets", "message"),
    [
        (("x", "x.base_layer"), (), "nested in another, which target_parameters does not name"),
        (("x.base_layer",), (), "nested in another"),
        (("x.base_layer.y",), (), "nested in another"),
        (EXPERTS, ("experts.down", "experts.up"), "pass base=, the model"),
        (("m.experts",), ("up",), "may mean up of it.*pass base="),
        (EXPERTS, ("experts.up",), "2 adapters in it, but .* names up of"),
    ],
)
def test_what_the_file_does_not_tell_is_refused(
    paths: tuple[str, ...], targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        places(*paths, targets=targets)


def test_a_graph_does_not_tell_which_of_two_parameters_was_first() -> None:
    up, down = nn.Parameter(torch.ones(4, 3, 5)), nn.Parameter(torch.ones(4, 5, 3))
    model = nn.Sequential(Computes(lambda m, x: x @ m.up @ m.down, up=up, down=down))
    paths, targets, x = ("0", "0.base_layer"), ("0.down", "0.up"), torch.ones(2, 3)
    found = places(*paths, base=model, targets=targets)
    assert [place.path for place in found.values()] == ["0.down", "0.up"]
    with pytest.raises(AdapterError, match=r"0: target_parameters may mean down, up of it"):
        places(*paths, base=lora_fx.trace(model, (x,)), targets=targets)


def test_a_parameter_that_the_base_lacks_is_none_of_the_module() -> None:
    assert places("m", base=model(), targets=("up", "fc.up"))["m"].parameter is None


def test_a_graph_tells_the_orientation_by_its_shapes(tmp_path: Path) -> None:
    case = save_peft_case("experts one", tmp_path / "a")
    gm = lora_fx.trace(case.base, (case.x,))
    by_graph, by_model = (load_adapter(case.directory, base=b) for b in (gm, case.base))
    for path, update in by_model.updates.items():
        assert all(map(torch.equal, update.tensors(), by_graph.updates[path].tensors()))


def update(**settings: Any) -> Update:
    stored = SourceRecord({}, settings) if settings else None
    return Update(torch.ones(2, 3), torch.ones(5, 2), 1.0, stored=stored)


def test_an_output_projection_is_inside_of_its_attention() -> None:
    homes = homes_of({"mha": update(), "mha.out_proj": update(), "other.out_proj": update()})
    assert homes["mha.out_proj"] == Home("mha.base_layer.out_proj", "")
    assert homes["other.out_proj"] == Home("other.out_proj", "other.out_proj")
    found = places(*(home.key for home in homes.values()))
    assert {path: found[home.key].path for path, home in homes.items()} == {p: p for p in homes}


def test_parameters_keep_their_order_when_one_is_gone() -> None:
    inner, outer = (update(parameter=name, depth=d) for name, d in (("a", 2), ("c", 0)))
    homes = homes_of({"m.a": inner, "m.c": outer})
    assert homes["m.c"] == Home("m", "m.c", "m.c")
    assert homes["m.a"] == Home("m.base_layer", "m.a", "m.a")


def test_a_parameter_called_weight_is_kept_at_its_module() -> None:
    homes = homes_of({"fc": update(parameter="weight", depth=0)})
    assert homes["fc"] == Home("fc", "fc.weight", "fc.weight")


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->beo", x, self.kernel)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"lora_A": (8, 3), "lora_B": (3, 8)},
         r"3 by 3, and a graph does not say .* the model itself"),
        ({"lora_A": (8, 3)}, r"^has \['lora_A\.weight'\], expected"),
    ],
)  # fmt: skip
def test_experts_that_nothing_tells_are_refused(
    leaves: dict[str, tuple[int, ...]], message: str
) -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(Square()))
    place = WrappedTarget("0.kernel", "0.kernel", "kernel", shape=(4, 3, 3))
    tensors = {f"{leaf}.weight": torch.ones(shape) for leaf, shape in leaves.items()}
    with pytest.raises(AdapterError, match=message):
        read_experts(place, tensors, {"r": 2, "scale": 1.5, "use_rslora": False}, layers_of(gm))
