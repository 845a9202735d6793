from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import TraceError, text, trace
from lora_fx.graph.example import example_of
from lora_fx.layers.sites import sites
from lora_fx.testing import make_adapter, zoo
from lora_fx.testing.zoo import traced, untraced

FRONTENDS = ["symbolic", "export"]
MODELS = ["bert", "gpt2", "llama", "mlp", "qwen2", "t5", "vit"]


@pytest.mark.parametrize("model", MODELS)
def test_export_is_bit_equal_and_shares_the_tensors(model: str) -> None:
    case, gm = traced(model)
    with torch.no_grad():
        got, wanted = gm(**case.others), case.model(**case.others)
    assert type(got) is type(wanted)
    leaves = [torch.utils._pytree.tree_leaves(o) for o in (got, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))
    held = {id(p) for p in case.model.parameters()}
    assert all(id(p) in held for p in gm.parameters())
    before = untraced(model).model.state_dict()
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_traced_model_keeps_its_own_parameters() -> None:
    case = untraced("mlp")
    before = dict(case.model.named_parameters())
    trace(case.model, (), case.inputs, dynamic_shapes=case.dynamic)
    assert all(p is before[name] for name, p in case.model.named_parameters())


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_normal_form_is_one_for_both_frontends(frontend: str, ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,), frontend=frontend)
    lines = [line for line in text(gm).split("\n") if "= linear" in line]
    assert lines == [
        "linear = linear(x, wide.weight, wide.bias)",
        "linear_1 = linear(tanh, again.weight)",
        "linear_2 = linear(tanh_1, again.weight)",
        "linear_3 = linear(dropout, narrow.weight)",
    ]
    assert torch.equal(gm(x), ragged(x))
    assert [s.path for s in sites(gm)] == ["wide", "again", "again", "narrow"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_shared_modules_keep_their_own_paths(frontend: str, shared: Any, x: Any) -> None:
    gm = trace(shared, (x,), frontend=frontend)
    *paths, tied = [s.path for s in sites(gm)]
    assert paths == ["one", "two", "weight"]
    assert tied in ("one.weight", "two.weight")  # each tracer picks a name for a shared parameter
    got, wanted = gm(x), shared(x)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert shared.two is shared.one


def test_tied_weights_are_told_apart_by_node() -> None:
    case, gm = zoo("qwen2")
    assert case.model.lm_head.weight is case.model.model.embed_tokens.weight
    assert sites(gm)[-1].path == "lm_head"
    assert example_of(gm).output_embedding == "lm_head"


def test_conv1d_is_a_site_with_a_transposed_weight() -> None:
    _, gm = zoo("gpt2")
    site = next(s for s in sites(gm) if s.path == "transformer.h.0.mlp.c_fc")
    assert site.transposed
    assert site.shape == (40, 24)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_convolution_and_embedding_are_aten_calls(frontend: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6, padding_idx=0)
            self.conv = nn.Conv1d(6, 5, 3, stride=2, padding=1, padding_mode="circular")
            self.norm = nn.LayerNorm(5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2))

    model, ids = Mixed().eval(), torch.randint(0, 11, (4, 8))
    gm = trace(model, (ids,), frontend=frontend)
    called = {str(node.target) for node in gm.graph.nodes}
    assert {"aten.embedding.default", "aten.conv1d.default"} <= called
    assert torch.equal(gm(ids), model(ids))


def test_dropout_stays_live_under_symbolic_tracing(ragged: Any, x: Any) -> None:
    gm = trace(ragged)
    torch.manual_seed(0)
    one = gm.train()(x)
    assert not torch.equal(one, gm(x))
    assert not ragged.drop.training
    assert torch.equal(gm.eval()(x), ragged(x))


def test_optional_arguments_that_are_left_out_are_fixed() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: Any, mask: Any = None, double: bool = False) -> Any:
            out = self.fc(x) if mask is None else self.fc(x) * mask
            return 2 * out if double else out

    model, x = Optional(), torch.randn(4, 3)
    assert torch.equal(trace(model)(x), model(x))
    both = trace(model, (x,), {"double": True, "mask": torch.ones(5)}, frontend="symbolic")
    assert torch.equal(both(x, torch.ones(5), True), model(x, torch.ones(5), True))


def test_positional_and_keyword_calls_agree() -> None:
    case, _ = zoo("bert")
    swapped = dict(reversed(case.inputs.items()))
    gm = trace(case.model, (), swapped)
    by_place = gm(case.inputs["input_ids"], case.inputs["attention_mask"])
    assert torch.equal(by_place.last_hidden_state, gm(**swapped).last_hidden_state)


def test_an_exported_program_and_a_graph_module_are_models_too(ragged: Any, x: Any) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(ragged, (x,), dynamic_shapes={"x": {0: batch}})
    gm = trace(program)
    assert torch.equal(gm(x[:3]), ragged(x[:3]))
    assert example_of(gm).dynamic_shapes == {"x": {0: torch.export.Dim.DYNAMIC}}
    again = trace(gm)
    assert text(again) == text(gm)
    foreign = trace(torch.fx.symbolic_trace(ragged))
    assert [s.path for s in sites(foreign)] == ["wide", "again", "again", "narrow"]
    assert torch.equal(foreign(x), ragged(x))


class Branching(nn.Module):
    """Its control flow hangs on data: no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"gate": Gate()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["gate"](x)


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_an_untraceable_model_is_refused_with_path_and_line(frontend: str, x: Any) -> None:
    with pytest.raises(TraceError) as caught:
        trace(Branching(), (x,), frontend=frontend)
    message = str(caught.value)
    assert "at inner.gate" in message
    assert "if x.sum() > 0:" in message
    assert "Try:" in message


def test_a_model_that_fails_in_eager_is_refused(ragged: Any) -> None:
    with pytest.raises(TraceError, match=r"at wide|at the model itself"):
        trace(ragged, (torch.randn(4, 2),))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [({"frontend": "jit"}, "'jit'"), ({"frontend": "export"}, "example inputs")],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], names: str, ragged: Any) -> None:
    with pytest.raises(TraceError, match=names):
        trace(ragged, **arguments)
    with pytest.raises(TraceError, match="tuple"):
        trace(ragged, torch.randn(4, 3))  # type: ignore[arg-type]


def test_in_place_operators_keep_their_meaning() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            y += 1
            torch.relu_(y[..., 2:])
            return y

    model, x = InPlace(), torch.randn(4, 3)
    for frontend in FRONTENDS:
        gm = trace(model, (x,), frontend=frontend)
        assert torch.equal(gm(x), model(x))
        torch.testing.assert_close(lora_fx.fold(gm)(x), model(x))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Apart(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - 2 * b

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(trace(Apart(), (x, x))(x, y), x - 2 * y)


class ByRow(nn.Module):
    """Goes through its rows one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        return torch.stack([self.fc(row) for row in x]) * times + y.sum()


def test_a_trace_that_failed_leaves_nothing_on_its_inputs() -> None:
    model, x, y = ByRow(), torch.randn(4, 3), torch.randn(4)
    with pytest.raises(TraceError, match="specialized it to be a constant"):
        trace(model, (x, y), dynamic_shapes=({0: "batch"}, None))
    assert torch.equal(trace(model, (x, y))(x, y), model(x, y))


def test_arguments_without_shapes_have_those_of_the_example() -> None:
    model, x, y = ByRow(), torch.randn(4, 3), torch.randn(4)
    gm = trace(model, (x,), {"y": y, "times": 2.0}, dynamic_shapes={"y": {0: "length"}})
    y = torch.randn(7)
    assert torch.equal(gm(x, y=y, times=2.0), model(x, y, 2.0))
    with pytest.raises(AssertionError, match=r"x.size\(\)\[0\] == 4"):
        gm(torch.randn(5, 3), y=y, times=2.0)
    with pytest.raises(TraceError, match=r"no input 'yy': name one .*: x, y$"):
        trace(model, (x, y), dynamic_shapes={"yy": {0: "length"}})


@pytest.mark.parametrize("axis", [-2, 2, 5, "0"])
def test_an_axis_that_is_not_there_is_refused(axis: object) -> None:
    """torch.export takes it, and the size stays that of the example."""
    model, x = nn.Linear(3, 5), torch.randn(4, 3)
    with pytest.raises(TraceError, match=f"no axis {axis!r}: name one of those .*: 0, 1$"):
        trace(model, (x,), dynamic_shapes=({axis: "batch"},))


class Pairs(nn.Module):
    def forward(self, pair: list[torch.Tensor], named: dict[str, torch.Tensor]) -> torch.Tensor:
        return pair[0] + pair[1] * named["by"]


def test_an_axis_that_is_not_there_is_refused_inside_an_argument() -> None:
    x = torch.randn(4, 3)
    free, wrong = {0: "batch"}, {2: "batch"}
    call = partial(trace, Pairs(), ([x, x], {"by": x}))
    gm = call(dynamic_shapes=([free, free], {"by": free}))
    x = torch.randn(7, 3)
    assert torch.equal(gm([x, x], {"by": x}), x + x * x)
    with pytest.raises(TraceError, match=r"pair\[1\] has no axis 2"):
        call(dynamic_shapes=([free, wrong], {"by": free}))
    with pytest.raises(TraceError, match=r"named\['by'\] has no axis 2"):
        call(dynamic_shapes=([free, free], {"by": wrong}))


class Guarded(nn.Module):
    """What it computes hangs on a size and on a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(9, 3), nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, negate: bool = False) -> torch.Tensor:
        y = self.fc(x + self.table(torch.arange(x.shape[1])))
        return -y if negate else y


def test_inputs_that_the_graph_is_not_good_for_are_refused() -> None:
    model = Guarded()
    fixed = trace(model, (torch.randn(2, 1, 3),))
    injected = lora_fx.inject(fixed, make_adapter({"fc": (5, 3)}))
    for gm in (fixed, injected, lora_fx.fold(injected)):
        with pytest.raises(AssertionError, match=r"x.size\(\)\[1\] == 1"):
            gm(torch.randn(2, 4, 3))
    negated = trace(model, (torch.randn(2, 4, 3),), {"negate": True})
    with pytest.raises(AssertionError, match="negate == True"):
        negated(torch.randn(2, 4, 3), negate=False)


def test_symbolic_tracing_refuses_what_leaves_no_trace(x: Any) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x)

    with pytest.raises(TraceError, match="autocast"):
        trace(Cast())
    model = Cast()
    got = trace(model, (x,))(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, model(x))


def test_attributes_that_forward_sets_are_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls, self.last = nn.Linear(3, 5), 0, None
            self.log: list[Any] = []
            self.seen: dict[str, Any] = {"n": 1}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.fc(x)
            self.calls += 1
            self.log.append(self.last)
            self.seen["x"] = x
            return self.last

    for frontend in FRONTENDS:
        model = Remembers()
        trace(model, (torch.randn(4, 3),), frontend=frontend)
        assert (model.calls, model.last, model.log, model.seen) == (0, None, [], {"n": 1})


def test_a_copy_of_a_graph_is_converted_without_the_model() -> None:
    """A graph itself shares the parameters, which torch converts in place."""
    layer = nn.Linear(3, 5)
    model = nn.Sequential(layer).eval()
    x = torch.randn(4, 3)
    gm, before = trace(model, (x,)), layer.weight.detach().clone()
    half = copy.deepcopy(gm).half()
    assert half(x.half()).dtype is torch.float16
    assert torch.equal(layer.weight, before)
    assert torch.equal(gm(x), model(x))
    gm.half()
    assert layer.weight.dtype is torch.float16  # the control: without the copy


def test_threads_that_trace_at_once_take_turns() -> None:
    """torch.export takes names off torch.Tensor while it runs, for the whole process."""

    def traced(seed: int) -> bool:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
        x = torch.randn(2, 3)
        return torch.equal(trace(model, (x,))(x), model(x))

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(traced, range(8))] == [True] * 8
