"""Branches read out of graphs that somebody else wrote LoRA into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, get_peft_model
from peft import LoraConfig as PeftConfig
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

import lora_fx
from lora_fx import Adapter, Update, adapter_from, fold, inject, text, trace
from lora_fx.injection.branches import branches
from lora_fx.layers.sites import sites
from lora_fx.passes import RaiseLora
from lora_fx.testing import Computes, Notebook, check_pass, make_adapter, relative, update_of

BRANCH = """\
x = input()
linear = linear(x, fc.weight, fc.bias)
matmul = matmul(x, fc.lora_A.{name})
matmul_1 = matmul(matmul, fc.lora_B.{name})
add = add(linear, matmul_1)
return add"""


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_hand_written_delta_becomes_a_branch(frontend: str, x: Any) -> None:
    module = Notebook().eval()
    gm = trace(module, (x,), frontend=frontend)
    seen = check_pass(RaiseLora("french"), gm, x, expected=module(x), control=module.fc(x))
    assert seen.after.replace("[add]", "add") == BRANCH.format(name="french")
    adapter = adapter_from(seen.gm, "french")
    torch.testing.assert_close(adapter.updates["fc"].delta(), 1.5 * module.a @ module.b)
    assert adapter.updates["fc"].rank == 2
    again = RaiseLora("french")(seen.gm)
    assert not again.modified


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("spelled", ["addmm", "in place", "einsum"])
def test_a_delta_added_by_its_last_product_becomes_a_branch(spelled: str, frontend: Any) -> None:
    class Added(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if spelled == "einsum":
                return self.fc(x) + 1.5 * torch.einsum("bi,or,ri->bo", x, self.a, self.b)
            a, b = self.a, self.b
            if spelled == "addmm":
                return torch.addmm(self.fc(x), 1.5 * (x @ b.T), a.T)
            return self.fc(x).addmm_(x @ b.T, a.T, alpha=1.5)

    module, x = Added().eval(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    gm = trace(module, (x,), frontend=frontend)
    seen = check_pass(RaiseLora("french"), gm, x, expected=module(x), control=module.fc(x))
    delta = adapter_from(seen.gm, "french").updates["fc"].delta()
    torch.testing.assert_close(delta, 1.5 * module.a @ module.b)


def test_its_adapter_goes_into_the_base(x: torch.Tensor) -> None:
    module = Notebook().eval()
    adapter = adapter_from(RaiseLora()(trace(module)).graph_module)
    base = trace(module.fc)
    renewed = inject(base, Adapter("french", {"weight": adapter.updates["fc"]}))
    torch.testing.assert_close(renewed(x), module(x))
    assert not torch.allclose(base(x), module(x), atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_what_peft_wrapped_becomes_a_branch(bias: bool, x: Any) -> None:
    base = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 7))
    before = base(x)
    config = PeftConfig(
        r=2, target_modules=["0", "2"], init_lora_weights=False, lora_bias=bias, lora_dropout=0.1
    )
    model = get_peft_model(base, config).eval()
    gm = trace(model, (x,))
    seen = check_pass(RaiseLora(), gm, x, expected=model(x), control=before)
    assert [branch.path for branch in branches(seen.gm)] == ["0", "2"]
    assert text(fold(seen.gm)) == text(fold(gm))


def test_an_adapter_of_what_peft_wrapped_goes_where_peft_s_own_goes(tmp_path: Any, x: Any) -> None:
    """Into the plain base, into a file for PEFT, and into the slots of what was exported."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7)).eval()
    config = PeftConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model, other = (get_peft_model(copy.deepcopy(base), config).eval() for _ in range(2))
    raised = RaiseLora("mine")(trace(model, (x,))).graph_module
    adapter = adapter_from(raised)
    torch.testing.assert_close(inject(trace(base, (x,)), adapter)(x), model(x))
    assert not torch.allclose(base(x), model(x), atol=1e-2)
    lora_fx.save_adapter(adapter, tmp_path / "mine")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "mine"))
    torch.testing.assert_close(loaded.eval()(x), model(x))
    file = tmp_path / "model.onnx"
    lora_fx.to_onnx(raised, file, adapters="input")
    other.save_pretrained(str(tmp_path / "other"))
    lora_fx.export_adapter(tmp_path / "other", file, tmp_path / "other.onnx_adapter")
    session = lora_fx.Session(file)
    (found,) = session.run({session.inputs[0]: x.numpy()}, tmp_path / "other.onnx_adapter").values()
    torch.testing.assert_close(torch.from_numpy(found), other(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other(x), model(x), atol=1e-2)


def test_what_is_called_as_peft_calls_it_and_is_not_wrapped_keeps_its_name(x: Any) -> None:
    base = nn.ModuleDict({"model": nn.Sequential(nn.Linear(6, 10))})
    model = Computes(lambda m, x: m.base_model["model"](x), base_model=base)
    assert [site.path for site in sites(trace(model, (x,)))] == ["base_model.model.0"]


def test_two_active_adapters_become_one_of_both_ranks(x: Any) -> None:
    base = nn.Sequential(nn.Linear(6, 10))
    before = base(x)
    model = get_peft_model(base, PeftConfig(r=2, target_modules=["0"], init_lora_weights=False))
    other = PeftConfig(r=3, target_modules=["0"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    seen = check_pass(RaiseLora(), trace(model, (x,)), x, expected=model(x), control=before)
    (update,) = adapter_from(seen.gm).updates.values()
    assert update.rank == 5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PeftConfig(r=2, target_modules=["0"], use_dora=True), "scaled"),
        (LoHaConfig(r=2, target_modules=["0"]), "no product"),
    ],
    ids=["dora", "loha"],
)
def test_what_is_no_branch_stays_and_says_why(config: Any, reason: str, x: Any) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 10)), config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    gm = trace(model.eval(), (x,))
    result = RaiseLora()(gm)
    assert not result.modified
    assert text(result.graph_module) == text(gm)
    (edit,) = result.edits
    assert edit.action == "skip"
    assert reason in edit.text


def test_calls_that_are_updated_differently_stay(x: torch.Tensor) -> None:
    class Once(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x)) + torch.sin(self.fc(x))

    result = RaiseLora()(trace(Once()))
    assert not result.modified
    assert [str(edit) for edit in result.edits] == ["skip fc: its calls are updated differently"]


@pytest.mark.parametrize("other", ["a", "b"])
def test_calls_with_factors_of_their_own_stay(other: str, x: torch.Tensor) -> None:
    class Both(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = super().forward(x)
            a, b = (2.0 * self.a, self.b) if other == "a" else (self.a, 2.0 * self.b)
            return torch.tanh(first) + torch.sin(self.fc(x) + 1.5 * (x @ (a @ b).T))

    result = RaiseLora()(trace(Both()))
    assert not result.modified
    assert [str(edit) for edit in result.edits] == ["skip fc: its calls are updated differently"]


def test_a_layer_called_twice_gets_one_pair_of_factors(x: Any) -> None:
    class Twice(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x)) + torch.sin(super().forward(2 * x))

    module = Twice().eval()
    control = torch.tanh(module.fc(x)) + torch.sin(module.fc(2 * x))
    seen = check_pass(RaiseLora(), trace(module), x, expected=module(x), control=control)
    assert len(branches(seen.gm)) == 2
    assert len([n for n, _ in seen.gm.named_parameters() if "lora_A" in n]) == 1


class Low(nn.Module):
    """A parametrization: its rank is low."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, into))
        self.b = nn.Parameter(torch.randn(out, 2))
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.b @ self.a).view(weight.shape) * self.scale


SUMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.fc.weight + 1.5 * m.a @ m.b, m.fc.bias),
    "behind": lambda m, x: F.linear(x, 1.5 * m.a @ m.b + m.fc.weight.float(), m.fc.bias),
    "less": lambda m, x: F.linear(x, m.fc.weight - (-1.5 * m.a) @ m.b, m.fc.bias),
    "addmm": lambda m, x: F.linear(x, torch.addmm(m.fc.weight, m.a, m.b, alpha=1.5), m.fc.bias),
    "turned": lambda m, x: x @ (m.fc.weight + 1.5 * m.a @ m.b).T + m.fc.bias,
    "both turned": lambda m, x: x @ (m.fc.weight.T + 1.5 * (m.b.T @ m.a.T)) + m.fc.bias,
    "a branch too": lambda m, x: (
        F.linear(x, m.fc.weight + m.a @ m.b, m.fc.bias) + x @ m.b.T @ m.a.T * 0.5
    ),
    "twice": lambda m, x: (
        F.linear(F.linear(x, m.fc.weight + 1.5 * m.a @ m.b, m.fc.bias)[..., :6],
                 m.fc.weight + 1.5 * m.a @ m.b, m.fc.bias)
    ),
}  # fmt: skip


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("spelled", SUMS)
def test_what_is_added_to_a_weight_becomes_a_branch(spelled: str, frontend: Any, x: Any) -> None:
    class Summed(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return SUMS[spelled](self, x)

    module = Summed().eval()
    delta = 1.5 * module.a @ module.b
    control = module.fc(module.fc(x)[..., :6]) if spelled == "twice" else module.fc(x)
    gm = trace(module, (x,), frontend=frontend)
    seen = check_pass(RaiseLora("mine"), gm, x, expected=module(x), control=control)
    (path,) = adapter_from(seen.gm, "mine").updates
    assert path == "fc"
    torch.testing.assert_close(adapter_from(seen.gm, "mine").updates["fc"].delta(), delta)
    assert {branch.path for branch in branches(seen.gm)} == {"fc"}
    assert not RaiseLora("mine")(seen.gm).modified


def test_a_parametrization_becomes_a_branch(x: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))
    before = model(x)
    for layer in (model[0], model[2]):
        register_parametrization(layer, "weight", Low(*layer.weight.shape))
    gm = trace(model.eval(), (x,))
    seen = check_pass(RaiseLora(), gm, x, expected=model(x), control=before)
    adapter = adapter_from(seen.gm)
    assert [*adapter.updates] == ["0", "2"]
    for path, update in adapter.updates.items():
        layer = model.get_submodule(path)
        delta = layer.weight - layer.parametrizations.weight.original
        torch.testing.assert_close(update.delta(), delta, atol=1e-6, rtol=1e-5)


class Kinds(nn.Module):
    """A layer of each kind that an adapter of two factors may stand beside."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.wide = nn.Embedding(20, 4), nn.Conv1d(4, 5, 3, padding=1, stride=2)
        self.point, self.flat = nn.Conv2d(1, 3, (1, 1)), nn.Conv2d(3, 4, (3, 2), padding=(1, 0))
        self.head = nn.Linear(5, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(self.words(ids).transpose(1, 2)))
        x = torch.relu(self.flat(torch.relu(self.point(x[:, None])))).mean(1)
        return self.head(x.transpose(1, 2))


def test_layers_of_every_kind_that_peft_wrapped_become_branches() -> None:
    """A rank that is no less than a head's outputs, too: it is the adapter's."""
    torch.manual_seed(0)
    base, ids = Kinds().eval(), torch.randint(0, 20, (2, 9))
    before = base(ids)
    names = ["words", "wide", "point", "flat", "head"]
    config = PeftConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    gm = trace(model, (ids,))
    seen = check_pass(RaiseLora(), gm, ids, expected=model(ids), control=before)
    adapter = adapter_from(seen.gm)
    assert set(adapter.updates) == set(names)
    assert {update.rank for update in adapter.updates.values()} == {3}
    for path, update in adapter.updates.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        delta = update.delta().T if path == "words" else update.delta()
        torch.testing.assert_close(delta, layer.get_delta_weight("default"))


def test_beside_a_convolution_in_groups_nothing_is_raised() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, groups=2)
            self.down, self.up = nn.Conv1d(4, 2, 3, groups=2), nn.Conv1d(2, 6, 1, groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.up(self.down(x))

    result = RaiseLora()(trace(Grouped().eval(), (torch.randn(2, 4, 9),)))
    assert not result.modified


def test_a_weight_that_an_adapter_makes_anew_stays_below_what_is_raised(x: Any) -> None:
    module = Notebook().eval()
    kron = update_of("lokr", (10, 6))
    base = trace(module, (x,))
    gm = inject(base, Adapter("german", {"fc": kron}))
    seen = check_pass(RaiseLora("mine"), gm, x, expected=gm(x), control=base(x))
    delta = adapter_from(seen.gm, "mine").updates["fc"].delta()
    torch.testing.assert_close(delta, 1.5 * module.a @ module.b)


@pytest.mark.parametrize("rows", [6, 18])
def test_what_is_added_to_a_kernel_becomes_a_branch_if_its_rows_are_few(rows: int) -> None:
    """loralib's convolution adds a product of (out * kernel, in * kernel), of no less rank."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.up = nn.Parameter(torch.randn(rows, 2))
            self.down = nn.Parameter(torch.randn(2, 6 * 27 // rows))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            delta = (self.up @ self.down).view(self.conv.weight.shape)
            return F.conv2d(x, self.conv.weight + 0.1 * delta, self.conv.bias, padding=1)

    model, x = Summed().eval(), torch.randn(2, 3, 5, 5)
    gm = trace(model, (x,))
    if rows == 18:
        (edit,) = RaiseLora()(gm).edits
        assert str(edit) == "skip conv: what is added is no product of smaller factors"
        return
    seen = check_pass(RaiseLora(), gm, x, expected=model(x), control=model.conv(x))
    (update,) = adapter_from(seen.gm).updates.values()
    assert update.shape == (6, 3, 3, 3)
    assert update.rank == 2


@pytest.mark.parametrize("elsewhere", ["plain", "another", "scaled", "full"])
def test_a_weight_that_more_is_done_with_stays(elsewhere: str, x: Any) -> None:
    class Summed(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, bias = self.fc.weight, self.fc.bias
            if elsewhere == "scaled":
                return F.linear(x, 2 * weight + self.a @ self.b, bias)
            if elsewhere == "full":
                return F.linear(x, weight + weight.sin(), bias)
            first = torch.tanh(F.linear(x, weight + self.a @ self.b, bias))
            if elsewhere == "plain":
                return first + torch.sin(F.linear(x, weight, bias))
            return first + torch.sin(F.linear(x, weight - self.a @ self.b, bias))

    gm = trace(Summed().eval(), (x,))
    result = RaiseLora()(gm)
    assert not result.modified
    (edit,) = result.edits
    wanted = {"scaled": "stored", "full": "no product"}
    assert wanted.get(elsewhere, "its calls are updated differently") in edit.text


def test_beside_a_part_of_a_weight_nothing_is_raised(x: Any) -> None:
    """An update is of a whole weight, and of the other rows nothing is known."""

    class Half(Notebook):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(x, self.fc.weight[:4], self.fc.bias[:4])
            return y + 1.5 * (x @ (self.a[:4] @ self.b).T)

    gm = trace(Half().eval(), (x,))
    result = RaiseLora()(gm)
    assert not result.modified
    assert text(result.graph_module) == text(gm)
    assert [edit.text for edit in result.edits] == [
        "it reads a part of its weight, or none that is stored"
    ]


class Shifted(nn.Module):
    """A layer to whose result something is added."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shift = nn.Linear(6, 5), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x) + self.shift
        return y


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("others", [0, 1])
def test_beside_what_scales_an_input_nothing_is_raised(
    others: int, frontend: Any, x: torch.Tensor
) -> None:
    scaled = Update(torch.randn(2, 6), torch.randn(5, 2), 1.0, col=torch.rand(6) + 0.5)
    plain = [make_adapter({"fc": (5, 6)}, name="german")] * others
    gm = inject(
        trace(Shifted().eval(), (x,), frontend=frontend),
        [Adapter("french", {"fc": scaled}), *plain],
    )
    result = RaiseLora()(gm)
    assert torch.equal(result.graph_module(x), gm(x))
    assert not result.modified
    assert all("scales what it reads" in edit.text for edit in result.edits)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_branches_in_a_row_are_branches_already(frontend: Any, x: torch.Tensor) -> None:
    update = Update(torch.randn(2, 6), torch.randn(5, 2), 1.0, col=torch.rand(6) + 0.5)
    plain = make_adapter({"0": (5, 6)}, name="german")
    base = trace(nn.Sequential(nn.Linear(6, 5)).eval(), (x,), frontend=frontend)
    result = RaiseLora()(inject(base, [Adapter("french", {"0": update}), plain]))
    assert not result.modified
    assert not result.edits


class InARow(nn.Module):
    """Two layers with LoRA written in, the second of which reads the first as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))
        self.c, self.d = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 6) -> (..., 3)."""
        x = self.one(x) - 2.0 * F.linear(F.linear(x, self.a), self.b)
        return self.two(x) - 0.5 * F.linear(F.linear(x, self.c), self.d)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_layers_in_a_row_are_raised_each_once(frontend: str, x: Any) -> None:
    module = InARow().eval()
    gm = trace(module, (x,), frontend=frontend)
    alone = module.two(module.one(x))
    seen = check_pass(RaiseLora(), gm, x, expected=module(x), control=alone)
    assert seen.after.count("linear(") == 2
    assert {branch.path for branch in branches(seen.gm)} == {"one", "two"}


def test_a_branch_whose_sum_is_read_twice_is_not_raised_again(x: Any) -> None:
    def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, m.w)
        return m.two(y) * m.two(y.flatten(0, 1)).tanh().view(4, 7, 3)

    parts: Any = {"w": nn.Parameter(torch.randn(5, 6)), "two": nn.Linear(5, 3)}
    gm = trace(Computes(read_twice, **parts).eval(), (x,))
    tuned = inject(gm, make_adapter({"w": (5, 6), "two": (3, 5)}))
    raised = RaiseLora()(tuned)
    assert not raised.modified
    assert {branch.name for branch in branches(raised.graph_module)} == {"french"}
    assert torch.equal(raised.graph_module(x), tuned(x))
    assert lora_fx.compare(tuned(x), gm(x)).relative > 1e-2


@pytest.mark.parametrize("shifts", [(1, 1), (1, 2), (0, 1), (1, 0)])
def test_calls_that_add_other_biases_stay(shifts: tuple[int, int]) -> None:
    fc, x = nn.Linear(4, 4, bias=all(shifts)), torch.randn(3, 4)

    def run(m: Any, x: torch.Tensor) -> Any:
        for shift in shifts:
            x = torch.tanh(m.fc(x) + shift if shift else m.fc(x))
        return x

    gm = trace(Computes(run, fc=fc).eval(), (x,))
    tuned = inject(gm, make_adapter({"fc": (4, 4)}))
    result = RaiseLora()(tuned)
    assert any("updated differently" in e.text for e in result.edits) is (shifts[0] != shifts[1])
    assert relative(result.graph_module(x), tuned(x)) <= 1e-6
    assert relative(gm(x), tuned(x)) > 1e-2
