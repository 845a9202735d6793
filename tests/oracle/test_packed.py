"""One weight that several calls read parts of, taken apart in any way, against the weight form."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import (
    Adapter,
    AdapterError,
    LoraConfig,
    Update,
    adapter_from,
    fold,
    inject,
    load_adapter,
    text,
    trace,
    unfold,
)
from lora_fx.adapters.other_updates import Scaling
from lora_fx.injection.branches import branches
from lora_fx.layers.sites import by_path
from lora_fx.passes import FoldLora, StripLora
from lora_fx.testing import relative

OUT, D, INTO = 12, 4, 5
Cut = Callable[[Any], Any]

# Ways to take (12, 5) apart in three.
CUTS: dict[str, Cut] = {
    "chunk": lambda w: w.chunk(3),
    "split": lambda w: torch.split(w, D),
    "sizes": lambda w: w.split([D, D, D], dim=0),
    "uneven": lambda w: w.split([2, 3, 7]),
    "slices": lambda w: (w[:D], w[D : 2 * D], w[-D:]),
    "of the shape": lambda w: (w[: w.shape[0] // 3], w[w.size(0) // 3 : -D], w[-D:, :]),
    "steps": lambda w: (w[::3], w[1::3], w[2::3]),
    "narrow": lambda w: (w.narrow(0, 0, D), torch.narrow(w, 0, D, D), w.narrow(0, 8, D)),
    "unbind": lambda w: w.view(3, D, INTO).unbind(0),
    "select": lambda w: (w.view(3, D, INTO)[0], w.unflatten(0, (3, D)).select(0, 1), w[8:]),
    "heads": lambda w: w.view(D, 3, INTO).unbind(1),
    "tensor_split": lambda w: w.tensor_split(3),
    "vsplit": lambda w: torch.vsplit(w, 3),
    "turned": lambda w: [w.t().chunk(3, 1)[place].t() for place in range(3)],
    "mT": lambda w: [w.mT.split(D, -1)[place].mT for place in range(3)],
    "permuted": lambda w: [w.view(3, D, INTO).permute(1, 2, 0)[..., i] for i in range(3)],
    "flat": lambda w: [w.reshape(-1)[20 * i : 20 * i + 20].view(D, INTO) for i in range(3)],
    "strided": lambda w: [w.as_strided((D, INTO), (INTO, 1), 20 * i) for i in range(3)],
    "lists": lambda w: (w[[0, 1, 2, 3]], w[[5, 4, 7, 6]], w[[8, 11, 9, 10]]),
    "index_select": lambda w: [w.index_select(0, torch.arange(i, 12, 3)) for i in range(3)],
    "flip": lambda w: [w.flip(0)[D * i : D * i + D] for i in range(3)],
    "copies": lambda w: [w[D * i : D * i + D].clone().contiguous() for i in range(3)],
    "cat": lambda w: (torch.cat([w[:2], w[-2:]]), w[2:6], w[6:-2]),
    "overlapping": lambda w: (w[:6], w[3:9], w[6:]),
    "whole and parts": lambda w: (w, w[:D], w[2:]),
}


class Packed(nn.Module):
    """Three layers of one weight, each of something else, between functions not affine."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.qkv, self.cut = nn.Linear(INTO, OUT, bias=False), cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b = self.cut(self.qkv.weight), self.biases()
        one = F.linear(torch.sin(x), w[0], b[0]).tanh().sum(-1, keepdim=True)
        two = F.linear(torch.cos(x), w[1], b[1]).tanh()[..., :2]
        return one + two * F.linear(x, w[2], b[2]).tanh()[..., :2].cumsum(-1)

    def biases(self) -> Any:
        return [None] * 3


class Net(nn.Module):
    """The above, below the root."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.proj = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x)
        return y


def rank2(out: int, into: int, seed: int = 3) -> Update:
    make = torch.Generator().manual_seed(seed)
    return Update(torch.randn(2, into, generator=make), torch.randn(out, 2, generator=make), 0.5)


def in_place(model: nn.Module, updates: dict[str, Any]) -> Any:
    """The weight form: each update put into its parameter, by name."""
    tuned = copy.deepcopy(model).requires_grad_(False)
    for name, update in updates.items():
        parameter = tuned.get_parameter(name)
        turned = isinstance(tuned.get_submodule(name.rpartition(".")[0]), Conv1D | nn.Embedding)
        new = update.weight(parameter.T if turned else parameter)
        parameter.copy_(new.T if turned else new)
    return tuned


def check(model: nn.Module, gm: fx.GraphModule, x: Any, names: dict[str, Any]) -> Any:
    """Injects, folds, gives back; every result against the weight form, the base is the control.

    Args:
        names: path of a layer -> the name of its parameter and the update.
    """
    adapter = Adapter("a", {path: update for path, (_, update) in names.items()})
    wanted = in_place(model, dict(names.values()))(x)
    injected = inject(gm, adapter)
    folded = fold(injected)
    assert relative(injected(x), wanted) <= 1e-6
    assert relative(folded(x), wanted) <= 1e-5
    assert relative(gm(x), wanted) > 1e-2
    assert "lora_" not in text(folded)
    assert FoldLora()(folded).modified is False
    assert text(unfold(folded)) == text(injected)
    assert text(StripLora()(injected).graph_module) == text(gm)
    assert by_path(folded).keys() == by_path(gm).keys()
    return injected, folded, wanted


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("way", CUTS)
def test_a_weight_taken_apart_in_any_way_is_one_layer(way: str, frontend: str) -> None:
    torch.manual_seed(0)
    model, x = Net(Packed(CUTS[way])).eval().requires_grad_(False), torch.randn(6, 7, INTO)
    gm = trace(model, (x,), frontend=frontend)
    assert FoldLora()(gm).modified is False
    update, other = rank2(OUT, INTO), rank2(OUT, INTO, seed=4)
    path, name = "proj.qkv", "proj.qkv.weight"
    injected, folded, _ = check(model, gm, x, {path: (name, update)})
    back = adapter_from(injected).updates[path]
    torch.testing.assert_close(back.weight(torch.zeros(OUT, INTO)), update.delta())
    # A second adapter on the folded layer acts on all of it, as on the base.
    twice = in_place(in_place(model, {name: update}), {name: other})(x)
    assert relative(inject(folded, Adapter("b", {path: other}))(x), twice) <= 1e-6
    fresh = inject(gm, LoraConfig(r=2, alpha=4, target_modules=["qkv"]))
    trained = [tuple(p.shape) for p in fresh.parameters() if p.requires_grad]
    assert trained == [(INTO, 2), (2, OUT)]


class Inputs(nn.Module):
    """The inputs of one layer taken apart: what it adds comes in two calls, its bias in one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.fc.weight.split([INTO, 4], 1)
        summed = F.linear(torch.sin(x), one, self.fc.bias) + F.linear(torch.cos(x[..., :4]), two)
        return torch.tanh(summed)


class Columns(nn.Module):
    """A weight that is stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Conv1D(8, INTO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, (one, two) = x.reshape(-1, INTO), self.fc.weight.chunk(2, dim=1)
        y = torch.addmm(self.fc.bias[:4], torch.sin(x), one)
        return torch.tanh(y) * F.linear(torch.cos(x), two.t()).tanh()


class Kernel(nn.Module):
    """A kernel of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv1d(7, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (one, two), bias = self.fc.weight.chunk(2), self.fc.bias
        return F.conv1d(torch.sin(x), one, bias[:4]).tanh() * F.conv1d(x, two, bias[4:]).tanh()


class Table(nn.Module):
    """Rows of a table, whose two halves are looked up apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Embedding(11, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, table = (x[..., 0].abs() * 2).long().clamp(0, 4), self.fc.weight
        return F.embedding(ids, table[:5]).tanh() * F.embedding(ids, table[5:]).cos()


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("cls", [Inputs, Columns, Kernel, Table])
def test_inputs_columns_kernels_and_tables_are_taken_apart_too(
    cls: type[nn.Module], frontend: str
) -> None:
    torch.manual_seed(0)
    model, x = cls().eval().requires_grad_(False), torch.randn(6, 7, INTO)
    gm = trace(model, (x,), frontend=frontend)
    out, into, *kernel = by_path(gm)["fc"][0].shape
    make = torch.Generator().manual_seed(3)
    down = torch.randn(2, into, *kernel, generator=make)
    update = Update(down, torch.randn(out, 2, generator=make), 0.5)
    check(model, gm, x, {"fc": ("fc.weight", update)})


class Biased(Packed):
    """Biases in parts of their own, one of them zero, as BEiT has them."""

    def __init__(self) -> None:
        super().__init__(CUTS["chunk"])
        self.q, self.v = (nn.Parameter(torch.randn(D)) for _ in range(2))

    def biases(self) -> Any:
        return torch.cat([self.q, torch.zeros_like(self.q), self.v]).chunk(3)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_results_are_scaled_with_the_biases_that_the_parts_have(frontend: str) -> None:
    torch.manual_seed(0)
    model, x = Biased().eval().requires_grad_(False), torch.randn(6, 7, INTO)
    row = torch.rand(OUT) + 0.5
    tuned = in_place(model, {"qkv.weight": Scaling(row=row)})
    tuned.q.mul_(row[:D])
    tuned.v.mul_(row[-D:])
    gm = trace(model, (x,), frontend=frontend)
    scaled = inject(gm, Adapter("a", {"qkv": Scaling(row=row)}))
    assert relative(scaled(x), tuned(x)) <= 1e-6
    assert relative(fold(scaled)(x), tuned(x)) <= 1e-5
    assert relative(gm(x), tuned(x)) > 1e-2


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_a_part_that_no_layer_reads_is_refused(frontend: str) -> None:
    model = Packed(lambda w: (w[:D], w[D : 2 * D], w[-D:] * 2)).eval()
    gm = trace(model, (torch.randn(6, 7, INTO),), frontend=frontend)
    with pytest.raises(AdapterError, match=r"a, qkv: its weight qkv\.weight is also read"):
        inject(gm, Adapter("a", {"qkv": rank2(OUT, INTO)}))
    with pytest.raises(AdapterError, match="would be missing there"):
        inject(gm, LoraConfig(r=2, alpha=4, target_modules=["qkv"], name="a"))


class WithLora(Packed):
    """Somebody's own LoRA on one of the parts."""

    def __init__(self) -> None:
        super().__init__(CUTS["chunk"])
        self.down, self.up = nn.Linear(INTO, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, three = self.qkv.weight.chunk(3)
        y = torch.sin(x)
        q = F.linear(y, one) + self.up(self.down(y))
        return q.tanh() * F.linear(torch.cos(x), two).tanh() + F.linear(x, three).tanh()


def test_lora_on_one_of_the_parts_folds_into_the_one_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = WithLora().eval().requires_grad_(False), torch.randn(6, 7, INTO)
    gm = trace(model, (x,))
    folded = fold(gm)
    assert relative(folded(x), model(x)) <= 1e-5
    assert [(path, calls[0].shape) for path, calls in by_path(folded).items()] == [
        ("qkv", (OUT, INTO))
    ]
    assert text(unfold(folded)) == text(gm)
    assert lora_fx.to_onnx(gm, tmp_path / "m.onnx").verified


# Exports.


def outputs(path: Path, x: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    (found,) = lora_fx.Session(path, threads=1).run({"x": x}, adapter=adapter).values()
    return torch.from_numpy(found)


def check_exports(
    model: nn.Module, gm: fx.GraphModule, x: Any, names: dict[str, Any], to: Path
) -> None:
    """Constant, folded and swappable files against the weight form."""
    injected, folded, wanted = check(model, gm, x, names)
    adapter = Adapter("a", {path: update for path, (_, update) in names.items()})
    for graph, file in ((injected, to / "beside.onnx"), (folded, to / "merged.onnx")):
        assert lora_fx.to_onnx(graph, file).verified
        assert relative(outputs(file, x), wanted) <= 1e-5
    file, own = to / "swappable.onnx", to / "a.onnx_adapter"
    lora_fx.to_onnx(gm, file, adapters="input", slots=list(names))
    lora_fx.export_adapter(adapter, file, own)
    assert relative(outputs(file, x, own), wanted) <= 1e-5
    assert relative(outputs(file, x), model(x)) <= 1e-5


@pytest.mark.parametrize(("way", "frontend"), [("steps", "symbolic"), ("lists", "export")])
def test_parts_are_exported_as_constants_merged_and_swappable(
    way: str, frontend: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Net(Packed(CUTS[way])).eval().requires_grad_(False), torch.randn(6, 7, INTO)
    gm = trace(model, (x,), frontend=frontend)
    names = {"proj.qkv": ("proj.qkv.weight", rank2(OUT, INTO))}
    check_exports(model, gm, x, names, tmp_path)


# nn.MultiheadAttention.

WIDE = 6
CALLS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "self": lambda x, p: [(x, x, x)],
    "cross": lambda x, p: [(x, p, p)],
    "all differ": lambda x, p: [(x, p, x + 1)],
    "positions": lambda x, p: [(x + p, x + p, x)],
    "queries": lambda x, p: [(x + p, x, x)],
    "q is v": lambda x, p: [(x, p, x)],
    "self and cross": lambda x, p: [(x, x, x), (x, p, p)],
    "every pattern": lambda x, p: [(x, x, x), (p, x, x), (x, p, x + 1)],
    "other sizes": lambda x, p: [(x, p[..., :5], x[..., :4])],
}
MASK = torch.ones(7, 7).triu(1).bool()
PADDING = torch.arange(7).repeat(7, 1) > 4
UNBATCHED = ["all differ", "positions", "self and cross", "bias_k", "kdim", "weights", "self"]
ATTENTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{calls: (calls, {}, {}) for calls in CALLS if calls != "other sizes"},
    "no bias": ("all differ", {"bias": False}, {}),
    "bias_k": ("positions", {"add_bias_kv": True}, {}),
    "bias_k of one": ("self", {"add_bias_kv": True}, {}),
    "zero attention": ("every pattern", {"add_zero_attn": True}, {}),
    "sequence first": ("all differ", {"batch_first": False}, {}),
    "dropout": ("positions", {"dropout": 0.3}, {}),
    "weights": ("all differ", {}, {"need_weights": True}),
    "each head's weights": (
        "positions",
        {},
        {"need_weights": True, "average_attn_weights": False},
    ),
    "mask": ("positions", {}, {"attn_mask": MASK}),
    "padding": ("all differ", {}, {"key_padding_mask": PADDING}),
    "kdim": ("other sizes", {"kdim": 5, "vdim": 4}, {}),
    "kdim without bias": ("other sizes", {"kdim": 5, "vdim": 4, "bias": False}, {}),
    "kdim and bias_k": ("other sizes", {"kdim": 5, "vdim": 4, "add_bias_kv": True}, {}),
}
NAMES = {"attn": "attn.in_proj_weight", "attn.out_proj": "attn.out_proj.weight"}


class Attends(nn.Module):
    def __init__(self, calls: str, made: dict[str, Any], given: dict[str, Any]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDE, 2, **{"batch_first": True, **made})
        self.calls, self.given = CALLS[calls], {"need_weights": False, **given}
        for name, parameter in self.attn.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for queries, keys, values in self.calls(x, torch.cos(x)):
            y, weights = self.attn(queries, keys, values, **self.given)
            total = total + torch.tanh(y if weights is None else y * weights.square().sum())
        return total


def attending(name: str, unbatched: bool) -> tuple[Attends, fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    model = Attends(*ATTENTIONS[name]).eval().requires_grad_(False)
    make = torch.Generator().manual_seed(1)
    x = torch.randn(7, WIDE, generator=make) if unbatched else torch.randn(7, 7, WIDE)
    return model, trace(model, (x,)), x


def every_update(gm: fx.GraphModule) -> dict[str, Any]:
    """An update for each of the attention's layers."""
    shapes = {path: calls[0].shape for path, calls in by_path(gm).items()}
    return {
        path: (NAMES.get(path, path), rank2(out, into, seed))
        for seed, (path, (out, into)) in enumerate(shapes.items())
    }


EVERY = [(name, False) for name in ATTENTIONS] + [(name, True) for name in UNBATCHED]


@pytest.mark.parametrize(("name", "unbatched"), EVERY)
def test_attention_is_adapted_whatever_it_is_called_with(name: str, unbatched: bool) -> None:
    model, gm, x = attending(name, unbatched)
    apart = [f"attn.{part}_proj_weight" for part in "qkv"]
    layers = [*(apart if name.startswith("kdim") else ["attn"]), "attn.out_proj"]
    assert list(by_path(gm)) == layers
    check(model, gm, x, every_update(gm))
    fresh = inject(gm, LoraConfig(r=2, alpha=4, target_modules=layers))
    found = {b.path: fresh.get_parameter(str(b.up.target)).shape for b in branches(fresh) if b.up}
    assert found == {path: (2, calls[0].shape[0]) for path, calls in by_path(gm).items()}
    assert name.startswith("kdim") or found["attn"] == (2, 3 * WIDE)
    linear = inject(gm, LoraConfig(r=2, alpha=4, target_modules="all-linear"))
    assert {b.path for b in branches(linear)} == {"attn.out_proj"}


@pytest.mark.parametrize("name", ["kdim", "bias_k", "every pattern"])
def test_attention_is_exported(name: str, tmp_path: Path) -> None:
    model, gm, x = attending(name, unbatched=name == "bias_k")
    check_exports(model, gm, x, every_update(gm), tmp_path)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("name", ["all differ", "positions", "self and cross"])
def test_attention_equals_peft(name: str, unbatched: bool, tmp_path: Path) -> None:
    model, gm, x = attending(name, unbatched)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of packed attention
        owner = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(3)
    for key, parameter in owner.named_parameters():
        if ".lora_" in key:
            parameter.data.normal_(0.0, 0.4)
    owner.save_pretrained(tmp_path / "french")
    adapter = load_adapter(tmp_path / "french", base=model)
    assert set(adapter.updates) == {"attn", "attn.out_proj"}
    injected = inject(gm, adapter)
    with torch.no_grad():
        wanted = owner(x)
        assert relative(injected(x), wanted) <= 1e-6
        assert relative(fold(injected)(x), wanted) <= 1e-5
        assert relative(gm(x), wanted) > 1e-2


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_attention_of_torchs_own_layers_is_adapted(cls: Any) -> None:
    torch.manual_seed(0)
    model = cls(WIDE, 2, 10, dropout=0.2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(3, 7, WIDE)
    given = (x,) if cls is nn.TransformerEncoderLayer else (x, torch.randn(3, 5, WIDE))
    gm = trace(model, given)
    names = {}
    for seed, (path, calls) in enumerate(by_path(gm).items()):
        packed = path.endswith("attn")
        name = f"{path}.in_proj_weight" if packed else f"{path}.weight"
        names[path] = name, rank2(*calls[0].shape, seed)
    assert names.keys() >= {"self_attn", "self_attn.out_proj"}
    wanted = in_place(model, dict(names.values()))(*given)
    injected = inject(gm, Adapter("a", {path: update for path, (_, update) in names.items()}))
    assert relative(injected(*given), wanted) <= 1e-6
    assert relative(fold(injected)(*given), wanted) <= 1e-5
    assert relative(gm(*given), wanted) > 1e-2
