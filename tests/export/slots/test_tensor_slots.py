"""Whole tensors that an adapter brings: heads, norms, biases, tokens, weights made anew."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lora_fx import Adapter, AdapterError, ExportError, Update, inject, load_adapter, trace
from lora_fx.adapters.adapter import AnyUpdate
from lora_fx.export import Session, export_adapter, slots_for, to_onnx
from lora_fx.export.slots.adapter_file import read_adapter_file
from lora_fx.export.slots.check_adapter import read_adapter
from lora_fx.kinds import trainable_tokens
from lora_fx.passes import StripLora
from lora_fx.testing import LayerShape, relative, update_of


class Classifier(nn.Module):
    """A table, a layer, a norm, and a head; the table may be a second head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11 if tied else 3, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, n) -> (batch, n, classes)."""
        return self.head(self.norm(torch.tanh(self.fc(self.table(ids)))))


IDS = torch.tensor([[1, 2, 3, 9], [4, 5, 9, 0], [3, 7, 1, 2]])
BATCH = {"dynamic_shapes": ({0: "batch"},)}


@functools.cache
def traced(model: nn.Module, x: torch.Tensor = IDS) -> Any:
    """The graph of one model: only read."""
    return trace(model.eval().requires_grad_(False), (x,), **BATCH)  # type: ignore[arg-type]


def lora(out: int, into: int, rank: int = 2) -> Update:
    return Update(torch.randn(rank, into), torch.randn(out, rank), 0.3)


def with_head(name: str, **more: torch.Tensor) -> Adapter:
    """What PEFT makes of a classifier: LoRA on a layer, and the head anew."""
    torch.manual_seed(len(name))
    head = {"head.weight": torch.randn(3, 6), "head.bias": torch.randn(3)}
    return Adapter(
        name, {"fc": lora(6, 6)}, head | {k.replace("__", "."): v for k, v in more.items()}
    )


def agrees(session: Session, model: nn.Module, adapter: Adapter | None, file: Path | None) -> Any:
    """Asserts that a file with an adapter file is eager with the adapter; gives the outputs."""
    torch.manual_seed(3)
    gm = traced(model)
    wanted = (gm if adapter is None else inject(gm, adapter))(IDS)
    (found,) = session.run({"ids": IDS}, file).values()
    assert relative(torch.from_numpy(found), wanted) <= 1e-5
    return wanted


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One file for two adapters, each with a head of its own, one with a norm too."""
    directory = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    model = Classifier()
    adapters = [with_head("one"), with_head("third", norm__bias=torch.randn(6))]
    gm = traced(model)
    slots = slots_for(gm, adapters)
    report = to_onnx(gm, directory / "model.onnx", adapters="input", slots=slots)
    for adapter in adapters:
        path = directory / f"{adapter.name}.onnx_adapter"
        export_adapter(adapter, directory / "model.onnx", path)
    return model, adapters, report, directory


def test_adapters_with_heads_of_their_own_swap(served: Any) -> None:
    model, adapters, report, directory = served
    assert report.slots == ["fc", "head.weight", "head.bias", "norm.bias"]
    session = Session(directory / "model.onnx")
    base = agrees(session, model, None, None)
    for adapter in adapters:
        other = agrees(session, model, adapter, directory / f"{adapter.name}.onnx_adapter")
        assert relative(other, base) > 1e-2


def test_a_slot_for_a_whole_tensor_is_an_initializer_that_can_be_overridden(served: Any) -> None:
    model, _, _, directory = served
    graph = onnx.load(directory / "model.onnx").graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    session = ort.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    open_ = {value.name for value in session.get_overridable_initializers()}
    assert open_ == {"fc.lora_A", "fc.lora_B", "head.weight", "head.bias", "norm.bias"}
    # As the model stores it, so that it reads in the file as in PEFT's.
    assert sizes["head.weight"] == [3, 6]
    (head,) = (t for t in graph.initializer if t.name == "head.weight")
    assert (onnx.numpy_helper.to_array(head) == model.head.weight.numpy()).all()


def test_what_an_adapter_leaves_alone_is_not_in_its_file(served: Any) -> None:
    _, (one, _), _, directory = served
    held = set(read_adapter(directory / "one.onnx_adapter").get_parameters())
    assert held == {"fc.lora_A", "fc.lora_B", *one.replacements}


def test_an_adapter_file_reads_back_with_its_tensors(served: Any) -> None:
    _, (one, _), _, directory = served
    again = load_adapter(directory / "one.onnx_adapter")
    assert again.replacements.keys() == one.replacements.keys()
    assert all(torch.equal(again.replacements[n], one.replacements[n]) for n in one.replacements)


def test_a_graph_with_the_adapter_in_it_exports_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, one = Classifier(), with_head("one")
    report = to_onnx(inject(traced(model), one), tmp_path / "m.onnx", adapters="input")
    assert report.slots == ["fc", "head.weight", "head.bias"]
    assert {row.what for row in report.checks} == {"base", "one", "adapted"}
    agrees(Session(tmp_path / "m.onnx"), model, None, None)


def test_strip_gives_back_what_an_adapter_replaced() -> None:
    torch.manual_seed(0)
    gm, one = traced(Classifier()), with_head("one")
    stripped = StripLora()(inject(gm, one)).graph_module
    assert torch.equal(stripped(IDS), gm(IDS))
    assert not torch.equal(inject(gm, one)(IDS), gm(IDS))
    # Of two that replace by the same, the tensor goes with the last.
    both = inject(inject(gm, one), Adapter("two", {}, one.replacements))
    left = StripLora("one")(both).graph_module
    assert torch.equal(left(IDS), inject(gm, Adapter("two", {}, one.replacements))(IDS))
    assert torch.equal(StripLora()(left).graph_module(IDS), gm(IDS))


def test_a_tied_head_that_is_replaced_leaves_the_table_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(tied=True)
    adapter = Adapter("a", {"fc": lora(6, 6)}, {"head.weight": torch.randn(11, 6)})
    table = Adapter("b", {}, {"table.weight": torch.randn(11, 6)})
    gm = traced(model)
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=slots_for(gm, [adapter, table]))
    for one in (adapter, table):
        export_adapter(one, tmp_path / "m.onnx", tmp_path / one.name)
    session = Session(tmp_path / "m.onnx")
    base = agrees(session, model, None, None)
    assert relative(agrees(session, model, adapter, tmp_path / "a"), base) > 1e-2
    assert relative(agrees(session, model, table, tmp_path / "b"), base) > 1e-2


def test_a_value_of_a_wider_type_is_the_base_s_if_it_rounds_to_it() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 5)).half().eval(), (torch.randn(4, 3).half(),))
    own = gm.get_parameter("0.bias").detach().float() * 1.00001
    same, other = (Adapter("a", {}, {"0.bias": value}) for value in (own, own + 1))
    assert slots_for(gm, [same]) == {}
    assert slots_for(gm, [other]) == {"0.bias": "weight"}


def tokens(head: bool) -> AnyUpdate:
    torch.manual_seed(5)
    rows = {"trainable_tokens_delta": torch.randn(3, 6)}
    return trainable_tokens.read(rows, {"indices": [9, 2, 5], "head": head, "shape": None})


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_factors_of_as_many_ranks(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(tied)
    updates = {"table": tokens(False)} | ({"head": tokens(True)} if tied else {})
    adapter, gm = Adapter("a", updates), traced(model)
    slots = slots_for(gm, [adapter])
    assert set(slots.values()) == {"factors"}
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=slots)
    export_adapter(adapter, tmp_path / "m.onnx", tmp_path / "a")
    values = read_adapter(tmp_path / "a").get_parameters()
    assert tuple(values["table.lora_A"].shape()) == (11, 3)
    session = Session(tmp_path / "m.onnx")
    base = agrees(session, model, None, None)
    assert relative(agrees(session, model, adapter, tmp_path / "a"), base) > 1e-2


def test_a_weight_made_anew_swaps_if_it_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, gm = Classifier(), traced(Classifier())
    adapter = Adapter("a", {"fc": update_of("lokr", LayerShape((6, 6)))})
    assert slots_for(gm, [adapter]) == {}
    torch.manual_seed(0)
    gm = traced(model)
    to_onnx(gm, tmp_path / "f.onnx", adapters="input", slots=["fc"])
    with pytest.raises(AdapterError, match=r'slots=\{"fc": "weight"\}'):
        export_adapter(adapter, tmp_path / "f.onnx", tmp_path / "a")
    report = to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots={"f*": "weight"})
    assert report.slots == ["fc.weight", "fc.bias"]
    session = Session(tmp_path / "m.onnx")
    base = agrees(session, model, None, None)
    # The slot takes whatever kind comes: the weight is W'.
    for one in (adapter, Adapter("lora", {"fc": lora(6, 6)})):
        export_adapter(one, tmp_path / "m.onnx", tmp_path / one.name)
        assert relative(agrees(session, model, one, tmp_path / one.name), base) > 1e-2


def test_a_replaced_weight_is_what_an_update_acts_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dora = Classifier(), update_of("dora", LayerShape((3, 6)))
    adapter, gm = Adapter("a", {"head": dora}, {"head.weight": torch.randn(3, 6)}), traced(model)
    slots = slots_for(gm, [adapter])
    assert slots == {"head": "vectors", "head.weight": "weight"}
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=slots)
    export_adapter(adapter, tmp_path / "m.onnx", tmp_path / "a")
    agrees(Session(tmp_path / "m.onnx"), model, adapter, tmp_path / "a")


REFUSED: dict[str, tuple[Adapter, str]] = {
    "no slot": (Adapter("a", {}, {"norm.weight": torch.ones(6) * 2}), r"no slot at norm\.weight"),
    "no such layer": (Adapter("a", {}, {"x.weight": torch.ones(6)}), r"no slot at x\.weight"),
    "other shape": (
        Adapter("a", {}, {"head.weight": torch.ones(4, 6)}),
        r"head\.weight: shape \(4, 6\), the model's is \(3, 6\)",
    ),
    "NaN": (
        Adapter("a", {}, {"head.bias": torch.full((3,), torch.nan)}),
        r"head\.bias: NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_slot_or_another_shape_is_refused(
    case: str, served: Any, tmp_path: Path
) -> None:
    adapter, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message):
        export_adapter(adapter, served[3] / "model.onnx", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_the_bases_own_needs_no_slot(served: Any, tmp_path: Path) -> None:
    model, _, _, directory = served
    same = {"norm.weight": model.norm.weight, "table.weight": model.table.weight}
    adapter = Adapter("a", {"fc": lora(6, 6)}, copy.deepcopy(same))
    export_adapter(adapter, directory / "model.onnx", tmp_path / "a")
    assert read_adapter_file(tmp_path / "a", "a").replacements == {}


def test_a_tensor_that_is_another_ones_is_not_the_bases_own(served: Any, tmp_path: Path) -> None:
    """Many are ones or zeros: what one of them is says nothing of the others."""
    model, _, _, directory = served
    assert torch.equal(model.norm.weight, torch.ones(6))
    ones = Adapter("a", {}, {"fc.bias": torch.ones(6)})
    with pytest.raises(AdapterError, match=r"no slot at fc\.bias"):
        export_adapter(ones, directory / "model.onnx", tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"fc": "dense"}, "'dense' is none of factors, vectors, weight"),
        (["fc", "nowhere.*"], r"no layer at nowhere\.\*; there are table, fc, head"),
        ({"head.scale": "weight"}, r"no layer at head\.scale"),
    ],
)
def test_slots_that_mean_nothing_are_refused(slots: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        to_onnx(traced(Classifier()), tmp_path / "m.onnx", adapters="input", slots=slots)
    assert not list(tmp_path.iterdir())


class Experts(nn.Module):
    """Two matrices for each of four experts, chosen by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 5, 6))
        self.down = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 6) -> (n, 6)."""
        weights = torch.softmax(x[:, :4], -1)
        inner = torch.tanh(torch.einsum("ni,eoi->eno", x, self.up))
        return torch.einsum("eno,eio,ne->ni", inner, self.down, weights)


def test_experts_swap_at_any_rank(tmp_path: Path) -> None:
    from lora_fx.adapters.other_updates import WeightUpdate, added_to_each

    torch.manual_seed(0)
    model, x = Experts(), torch.randn(7, 6)
    gm = traced(model, x)

    def adapter(rank: int) -> Adapter:
        shapes = {"up": (4, 5, 6), "down": (4, 6, 5)}
        updates = {
            path: WeightUpdate(
                "lora",
                added_to_each(torch.randn(e, rows, rank), torch.randn(e, rank, cols)),
                (e, rows, cols),
            )
            for path, (e, rows, cols) in shapes.items()
        }
        return Adapter(f"r{rank}", updates)

    adapters = [adapter(rank) for rank in (1, 3, 8)]
    slots = slots_for(gm, adapters)
    assert slots == {"up": "factors", "down": "factors"}
    report = to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=slots)
    assert report.verified
    session = Session(tmp_path / "m.onnx")
    (base,) = session.run({"x": x}).values()
    assert relative(torch.from_numpy(base), model(x)) <= 1e-5
    for one in adapters:
        export_adapter(one, tmp_path / "m.onnx", tmp_path / one.name)
        (found,) = session.run({"x": x}, tmp_path / one.name).values()
        wanted = inject(gm, one)(x)
        assert relative(torch.from_numpy(found), wanted) <= 1e-5
        assert relative(torch.from_numpy(base), wanted) > 1e-2
        again = inject(gm, load_adapter(tmp_path / one.name))
        assert relative(again(x), wanted) <= 1e-5


@pytest.mark.parametrize("rank", [2, 4])
def test_a_grouped_convolution_takes_updates_that_mix_its_groups_and_others(
    rank: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1)), torch.randn(2, 4, 5, 5)
    gm = trace(model.eval().requires_grad_(False), (x,))
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=["0"])
    session = Session(tmp_path / "m.onnx")
    updates = {
        "mixing": Update(torch.randn(rank, 4, 3, 3), torch.randn(6, rank), 0.3),
        "grouped": Update(torch.randn(rank, 4, 3, 3), torch.randn(6, rank // 2), 0.3),
        "inside": Update(torch.randn(rank, 2, 3, 3), torch.randn(6, rank), 0.3),
    }
    for name, update in updates.items():
        adapter = Adapter(name, {"0": update})
        export_adapter(adapter, tmp_path / "m.onnx", tmp_path / name)
        (found,) = session.run({"input": x}, tmp_path / name).values()
        wanted = inject(gm, adapter)(x)
        assert relative(torch.from_numpy(found), wanted) <= 1e-5
        assert relative(model(x), wanted) > 1e-2


def test_a_grouped_convolution_takes_its_whole_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1)), torch.randn(2, 4, 5, 5)
    gm = trace(model.eval().requires_grad_(False), (x,))
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots={"0": "weight"})
    adapter = Adapter("a", {"0": update_of("lokr", LayerShape((6, 2, 3, 3), 2))})
    export_adapter(adapter, tmp_path / "m.onnx", tmp_path / "a")
    (found,) = Session(tmp_path / "m.onnx").run({"input": x}, tmp_path / "a").values()
    wanted = inject(gm, adapter)(x)
    assert relative(torch.from_numpy(found), wanted) <= 1e-5
    assert relative(model(x), wanted) > 1e-2
