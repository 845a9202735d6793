"""Any adapter as plain LoRA: what it computes, how near it is, and what is refused."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import AdapterError, inject, trace
from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import Scaling, WeightUpdate, added
from lora_fx.adapters.source_record import is_embedding
from lora_fx.adapters.updates import Update
from lora_fx.kinds import KINDS
from lora_fx.testing import (
    UPDATES,
    Attention,
    Between,
    Experts,
    LayerShape,
    Ragged,
    make_adapter,
    relative,
    same_adapter,
    tiny,
    update_of,
)

conv1d: Any = Conv1D
torch.manual_seed(0)
# Layer -> the module, the shape of x, and what an update must know.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], LayerShape]] = {
    "linear": (nn.Linear(4, 6), (3, 7, 4), LayerShape((6, 4))),
    "Conv1D": (conv1d(6, 4), (3, 7, 4), LayerShape((6, 4))),
    "packed": (Attention(4, crossed=True), (3, 7, 4), LayerShape((12, 4))),
    "table": (nn.Embedding(10, 6), (3, 7), LayerShape((6, 10), is_table=True)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=1), (3, 4, 7, 8), LayerShape((6, 4, 3, 2))),
    "grouped": (nn.Conv2d(4, 6, (3, 2), groups=2), (3, 4, 7, 8), LayerShape((6, 2, 3, 2), 2)),
    "turned": (nn.ConvTranspose1d(4, 6, 3, 2), (3, 4, 9), LayerShape((6, 4, 3))),
}
UNDEFINED = {
    "vera": ("conv2d", "grouped", "turned"),
    "fused": ("table", "conv2d", "grouped", "turned"),
    "tokens": tuple(name for name in LAYERS if name != "table"),
    "dora": ("grouped",),
    "ia3_in": ("table",),
}
CASES = [(kind, n) for kind in UPDATES for n in LAYERS if n not in UNDEFINED.get(kind, ())]


@functools.cache
def base_of(name: str) -> tuple[nn.Module, torch.Tensor, fx.GraphModule]:
    """A model of one layer, its input and its graph: only read."""
    module, shape, layer = LAYERS[name]
    torch.manual_seed(0)
    module = copy.deepcopy(module)
    model = (module if name == "packed" else Between(module)).eval().requires_grad_(False)
    x = torch.randint(0, 10, shape) if layer.is_table else torch.randn(shape)
    frontend: Any = "export" if name == "packed" else "auto"
    return model, x, trace(model, (x,), frontend=frontend)


class Made:
    """One kind on one layer, and what the adapter computes."""

    def __init__(self, kind: str, name: str) -> None:
        self.model, self.x, self.gm = base_of(name)
        self.adapter = Adapter("french", {"layer": update_of(kind, LAYERS[name][2])})
        self.wanted = self.of(self.adapter)

    @torch.no_grad()
    def of(self, adapter: Adapter) -> torch.Tensor:
        outputs: torch.Tensor = inject(self.gm, adapter)(self.x)
        return outputs


def louder(adapter: Adapter) -> Adapter:
    updates: Any = adapter.updates
    return replace(
        adapter, updates={p: replace(u, scale=1.1 * u.scale) for p, u in updates.items()}
    )


def delta(update: Any, weight: torch.Tensor) -> torch.Tensor:
    return (update.weight(weight.double()) - weight.double()).flatten(1)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_with_all_the_energy_every_kind_is_lora_on_every_layer(kind: str, name: str) -> None:
    made = Made(kind, name)
    for base in (made.model, made.gm):
        adapter, layers, stayed = made.adapter.to_lora(energy=1.0, base=base)
        update = adapter.updates["layer"]
        assert isinstance(update, Update)
        assert update.is_plain
        assert update.kind in ("lora", "rslora", *(["lora_bias"] if kind == "lora_bias" else []))
        assert (layers["layer"].rank, stayed) == (update.rank, {})
        assert layers["layer"].error < 1e-7
        assert is_embedding(update.stored) == (name == "table")
        assert relative(made.of(adapter), made.wanted) <= 1e-6
        assert relative(made.of(louder(adapter)), made.wanted) > 1e-3
    with torch.no_grad():
        assert relative(made.gm(made.x), made.wanted) > 1e-3


@pytest.mark.parametrize(("kind", "name"), [c for c in CASES if c[1] not in ("grouped", "turned")])
def test_a_lower_rank_is_as_far_off_as_is_told_and_no_nearer_one_exists(
    kind: str, name: str
) -> None:
    made = Made(kind, name)
    lora, layers, _ = made.adapter.to_lora(1, base=made.model)
    held: Any = made.model.get_submodule("layer")
    weight = held.in_proj_weight if name == "packed" else held.weight
    weight = weight.T if name in ("Conv1D", "table") else weight
    whole, near = (delta(a.updates["layer"], weight) for a in (made.adapter, lora))
    values = torch.linalg.svdvals(whole)
    told = layers["layer"].error
    assert layers["layer"] == (made.adapter.updates["layer"].kind, 1, told)
    assert layers["layer"].energy == pytest.approx(1 - told**2)
    assert told == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-5)
    assert float((whole - near).norm() / whole.norm()) == pytest.approx(told, rel=1e-5)
    assert float((whole - 0.9 * near).norm() / whole.norm()) > told


@pytest.mark.parametrize("kind", UPDATES)
def test_without_a_base_what_does_not_depend_on_it_is_the_same(kind: str) -> None:
    made = Made(kind, "table" if kind == "tokens" else "linear")
    if kind in ("dora", "glora", "ia3", "ia3_in", "oft", "tokens"):
        with pytest.raises(AdapterError, match="adapter french: layer: what the update does depen"):
            made.adapter.to_lora(2)
        return
    for cut in ({"rank": 1}, {"energy": 0.8}):
        alone, told, _ = made.adapter.to_lora(**cut)  # type: ignore[arg-type]
        beside, again, _ = made.adapter.to_lora(**cut, base=made.model)  # type: ignore[arg-type]
        assert told == again
        same_adapter(alone, beside)


def test_lora_of_no_higher_rank_stays_the_adapters_own() -> None:
    adapter = make_adapter({"wide": (5, 3), "narrow": (7, 5)})
    lora, layers, _ = adapter.to_lora(2, base=Ragged())
    assert all(lora.updates[path] is update for path, update in adapter.updates.items())
    assert set(layers.values()) == {("lora", 2, 0.0)}
    loha = Adapter("a", {"wide": update_of("loha", (5, 3))})
    update: Any = loha.to_lora(4).adapter.updates["wide"]  # of rank 2 * 2, exactly
    given: Any = loha.updates["wide"]
    assert (update.kind, update.stored, update.rank) == ("lora", None, 4)
    assert torch.equal(update.down, given.down)
    assert torch.equal(update.up, given.up)


def test_factors_of_low_rank_are_found_in_what_is_made_anew() -> None:
    wide, make = 40, torch.Generator().manual_seed(0)
    one = torch.randn(5, 5, generator=make)
    other = torch.randn(8, 1, generator=make) @ torch.randn(1, 8, generator=make)
    kron = WeightUpdate("lokr", added(torch.kron(one, other)), (wide, wide))
    model = nn.Sequential(nn.Linear(wide, wide))
    found = Adapter("a", {"0": kron}).to_lora(energy=1 - 1e-10, base=model)
    assert found.layers["0"].rank == 5
    assert found.layers["0"].error < 1e-5
    tokens = Adapter("a", {"0": update_of("tokens", LayerShape((6, 10), is_table=True))})
    table = nn.Sequential(nn.Embedding(10, 6))
    assert tokens.to_lora(energy=1.0, base=table).layers["0"].rank == 2


def test_rows_of_a_large_table_are_exact_and_others_as_they_were() -> None:
    model = nn.Sequential(nn.Embedding(200_000, 64)).eval()
    rows, ids = torch.randn(2, 64), torch.tensor([[5, 199_999, 7]])
    update = KINDS["tokens"].read({"trainable_tokens_delta": rows}, {"indices": [5, 199_999]})
    lora = Adapter("a", {"0": update}).to_lora(2, base=model).adapter
    with torch.no_grad():
        outputs = inject(trace(model, (ids,)), lora)(ids)[0]
        assert relative(outputs[:2], rows) <= 1e-6
        assert relative(outputs[2], model(ids)[0, 2]) <= 1e-6
        assert relative(model(ids)[0, :2], rows) > 0.5


class TestExperts:
    """A parameter of three matrices, of which PEFT's files have LoRA alone."""

    @staticmethod
    def made() -> tuple[nn.Module, Adapter]:
        torch.manual_seed(0)
        model = Between(Experts()).eval()
        layer = LayerShape((3, 6, 4), path="layer.up_proj", make=lambda: model)
        return model, Adapter("a", {layer.path: update_of("lora", layer)})

    def test_each_is_cut_by_itself(self, tmp_path: Path) -> None:
        model, adapter = self.made()
        x = torch.randn(2, 7, 4)
        gm = trace(model, (x,))
        lora, layers, _ = adapter.to_lora(1, base=model)
        held: Any = model.get_parameter("layer.up_proj").detach()
        path = "layer.up_proj"
        whole, near = (a.updates[path].weight(held) - held for a in (adapter, lora))
        for one, other in zip(whole, near, strict=True):
            values = torch.linalg.svdvals(one)
            assert relative(other, one) == pytest.approx(float(values[1] / values.norm()), rel=1e-4)
        assert layers[path].rank == 1
        assert layers[path].error == pytest.approx(float((whole - near).norm() / whole.norm()))
        lora_fx.save_adapter(lora, tmp_path / "out")
        again = lora_fx.load_adapter(tmp_path / "out", base=model)
        with torch.no_grad():
            wanted = inject(gm, lora)(x)
            assert relative(inject(gm, again)(x), wanted) <= 1e-6
            assert relative(inject(gm, adapter)(x), wanted) > 1e-3

    def test_those_of_no_higher_rank_stay(self) -> None:
        model, adapter = self.made()
        for cut in ({"rank": 2}, {"energy": 1.0}):
            lora, layers, _ = adapter.to_lora(**cut, base=model)  # type: ignore[arg-type]
            assert lora.updates["layer.up_proj"] is adapter.updates["layer.up_proj"]
            assert layers["layer.up_proj"] == ("lora", 2, 0.0)

    def test_what_is_no_product_of_each_is_refused(self) -> None:
        model, _ = self.made()
        dense = WeightUpdate("full", added(torch.randn(3, 6, 4)), (3, 6, 4))
        with pytest.raises(AdapterError, match="no product for each block, and it holds several"):
            Adapter("a", {"layer.up_proj": dense}).to_lora(1, base=model)


class TestReplaced:
    """PEFT's ``modules_to_save``: weights of layers become LoRA, other tensors stay."""

    @staticmethod
    def made() -> tuple[nn.Module, Adapter]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)).eval()
        weights = {
            "2.weight": torch.randn(2, 5),
            "2.bias": torch.ones(2),
            "1.weight": torch.ones(5),
        }
        update = make_adapter({"0": (5, 3)}).updates["0"]
        return model, Adapter("french", {"0": update}, weights)

    def test_a_head_becomes_lora_and_the_rest_stays(self) -> None:
        model, adapter = self.made()
        found = adapter.to_lora(2, base=model)
        assert found.layers["2"].kind == "replaced"
        assert found.layers["2"].error < 1e-7
        assert found.adapter.replacements.keys() == found.stayed.keys() == {"2.bias", "1.weight"}
        assert "2.bias  as it was: it is no weight of a layer" in str(found)
        x = torch.randn(4, 3)
        gm = trace(model, (x,))
        with torch.no_grad():
            wanted = inject(gm, adapter)(x)
            assert relative(inject(gm, found.adapter)(x), wanted) <= 1e-6
            assert relative(inject(gm, adapter.to_lora(1, base=model).adapter)(x), wanted) > 1e-3

    def test_an_update_of_a_replaced_weight_is_counted_from_the_base(self) -> None:
        model, adapter = self.made()
        both = Adapter("a", {"2": update_of("dora", (2, 5))}, adapter.replacements)
        found = both.to_lora(energy=1.0, base=model)
        assert found.layers["2"].kind == "dora"
        x = torch.randn(4, 3)
        gm = trace(model, (x,))
        with torch.no_grad():
            wanted = inject(gm, both)(x)
            assert relative(inject(gm, found.adapter)(x), wanted) <= 1e-6
            assert relative(inject(gm, replace(found.adapter, updates={}))(x), wanted) > 1e-3

    @pytest.mark.parametrize("names", [["2.weight"], ["2.bias"], ["2.weight", "2.bias"]], ids=str)
    def test_what_scales_a_replaced_weight_scales_its_bias(self, names: list[str]) -> None:
        model, adapter = self.made()
        replaced = {name: adapter.replacements[name] for name in names}
        scaled = Adapter("a", {"2": Scaling(row=torch.tensor([0.5, 3.0]))}, replaced)
        found = scaled.to_lora(energy=1.0, base=model).adapter
        assert found.replacements.keys() == replaced.keys() - {"2.weight"}
        x = torch.randn(4, 3)
        gm = trace(model, (x,))
        with torch.no_grad():
            wanted = inject(gm, scaled)(x)
            assert relative(inject(gm, found)(x), wanted) <= 1e-6
            assert relative(inject(gm, replace(scaled, updates={}))(x), wanted) > 1e-2

    def test_what_is_the_bases_own_stays(self) -> None:
        model, adapter = self.made()
        own = {"2.weight": model.get_parameter("2.weight").detach().clone()}
        found = replace(adapter, replacements=own).to_lora(2, base=model)
        assert found.stayed == {"2.weight": "it is the base's own"}
        assert found.layers.keys() == {"0"}

    def test_without_a_base_all_of_it_stays(self) -> None:
        _, adapter = self.made()
        found = adapter.to_lora(2)
        assert found.adapter.replacements.keys() == adapter.replacements.keys()
        assert set(found.stayed.values()) == {
            "whether it is a layer's weight is not known without base="
        }

    def test_one_of_another_shape_is_refused(self) -> None:
        model, adapter = self.made()
        wrong = replace(adapter, replacements={"2.weight": torch.zeros(3, 5)})
        with pytest.raises(
            AdapterError, match=r"2\.weight: shape \(3, 5\), the model's is \(2, 5\)"
        ):
            wrong.to_lora(2, base=model)


def test_a_table_that_is_tied_to_its_head_is_changed_on_both_sides() -> None:
    torch.manual_seed(0)
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator,union-attr]
    tensors = {"trainable_tokens_delta": torch.randn(2, int(width))}
    read = KINDS["tokens"].read
    table = read(tensors, {"indices": [1, 4]})
    head = read(tensors, {"indices": [1, 4], "head": True, "tied": "model.embed_tokens"})
    adapter = Adapter("a", {"model.embed_tokens": table, "lm_head": head})
    gm = trace(model, (), {"input_ids": ids, "use_cache": False})
    with torch.no_grad():
        wanted = inject(gm, adapter)(input_ids=ids, use_cache=False)["logits"]
        for base in (model, gm):
            lora = adapter.to_lora(energy=1.0, base=base).adapter
            found = inject(gm, lora)(input_ids=ids, use_cache=False)["logits"]
            assert relative(found, wanted) <= 1e-5
            alone = Adapter("a", {"lm_head": lora.updates["lm_head"]})
            found = inject(gm, alone)(input_ids=ids, use_cache=False)["logits"]
            assert relative(found, wanted) > 1e-3


def test_the_report_says_each_layer() -> None:
    adapter = Adapter("french", {"wide": update_of("loha", (5, 3))})
    found = adapter.to_lora(2, base=Ragged())
    error = found.layers["wide"].error
    assert found.errors == {"wide": error}
    assert str(found) == (
        "adapter french as LoRA: 1 layers\n"
        f"  wide  loha -> rank 2  error {error:.2e}  energy {1 - error**2:.6f}"
    )
    told = {"kind": "loha", "rank": 2, "error": error, "energy": found.layers["wide"].energy}
    assert found.to_dict() == {"layers": {"wide": told}, "stayed": {}}


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({}, "rank is None and energy None: give one of the two"),
        ({"rank": 2, "energy": 0.5}, "rank is 2 and energy 0.5: give one of the two"),
        ({"rank": 0}, "rank is 0, expected a positive integer"),
        ({"rank": True}, "rank is True, expected a positive integer"),
        ({"energy": 1.5}, "energy is 1.5, expected a fraction"),
        ({"energy": float("nan")}, "energy is nan, expected a fraction"),
    ],
)
def test_what_to_keep_is_said_once(cut: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make_adapter({"wide": (5, 3)}).to_lora(**cut)


def test_what_does_not_fit_the_base_is_refused_by_name() -> None:
    for path, message in (
        ("absent", "the model has no module or parameter absent. Use the base"),
        ("narrow", "narrow: made for a layer 3 -> 5, the model's is 5 -> 7"),
    ):
        with pytest.raises(AdapterError, match=message):
            make_adapter({path: (5, 3)}).to_lora(1, base=Ragged())
    with pytest.raises(AdapterError, match="base is a dict, expected the model"):
        make_adapter({"wide": (5, 3)}).to_lora(1, base={})  # type: ignore[arg-type]
    infinite = torch.full((5,), float("inf"))
    for broken, name in (
        (Adapter("a", {"wide": Scaling(row=infinite)}), "wide"),
        (Adapter("a", {}, {"wide.bias": infinite}), r"wide\.bias"),
    ):
        with pytest.raises(AdapterError, match=f"adapter a: NaN or infinity in {name}"):
            broken.to_lora(1, base=Ragged())
