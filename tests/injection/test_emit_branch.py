"""Every kind of update on every kind of layer: the weight form and what the graph computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from lora_fx import Adapter, AdapterError, Update, adapter_from, fold, inject, text, trace
from lora_fx.adapters.adapter import AnyUpdate, Scaling, WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.algebra.matrix_expr import Kron, Sum, constant
from lora_fx.injection.branches import branches
from lora_fx.layers.sites import sites
from lora_fx.passes import StripLora
from lora_fx.testing import Attention, Between, folds_to, operators, relative


def conv(dims: int, kernel: Any = (3, 2, 1), **options: Any) -> nn.Module:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return kind(4, 6, kernel_size=kernel[:dims], **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Between(nn.Linear(3, 5)),
    "linear_no_bias": lambda: Between(nn.Linear(3, 5, bias=False)),
    "transposed": lambda: Between(Conv1D(5, 3)),
    "embedding": lambda: Between(nn.Embedding(11, 5, padding_idx=0)),
    "conv1d": lambda: Between(conv(1, stride=2, padding=1)),
    "conv2d": lambda: Between(conv(2, stride=(2, 1), padding=1, dilation=(1, 2))),
    "conv2d_same": lambda: Between(conv(2, (3, 5), padding="same", bias=False)),
    "conv2d_circular": lambda: Between(conv(2, padding=1, padding_mode="circular")),
    "conv3d": lambda: Between(conv(3, stride=(1, 2, 1), padding=(1, 0, 1))),
    "conv2d_grouped": lambda: Between(conv(2, groups=2, padding=1)),
    "attention": lambda: Attention(12),
    "attention_crossed": lambda: Attention(12, crossed=True),
}


def example(layer: str, batch: int = 4) -> torch.Tensor:
    make = torch.Generator().manual_seed(batch)
    if layer == "embedding":
        return torch.randint(1, 11, (batch, 7), generator=make)
    dims = int(layer[4]) if layer.startswith("conv") else 0
    sizes = (4, 7, 8, 5)[: dims + 1] if dims else (7, 12 if "attention" in layer else 3)
    return torch.randn(batch, *sizes, generator=make)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def _lokr(shape: tuple[int, ...]) -> AnyUpdate:
    one, two = constant(random(shape[0], 1)), constant(random(1, torch.Size(shape[1:]).numel()))
    return WeightUpdate("lokr", lambda weight: Sum(weight, Kron(one, two)), shape)


KINDS: dict[str, Callable[[tuple[int, ...]], AnyUpdate]] = {
    "lora": lambda s: Update(random(2, *s[1:]), random(s[0], 2), 1.5),
    "lora_bias": lambda s: Update(random(2, *s[1:]), random(s[0], 2), 1.5, bias=random(s[0])),
    "dora": lambda s: Update(
        random(2, *s[1:]), random(s[0], 2), 1.5, "dora", magnitude=random(s[0]).abs() + 0.5
    ),
    "rows": lambda s: Update(random(2, *s[1:]), random(s[0], 2), 1.5, row=random(s[0]) + 1),
    "cols": lambda s: Update(random(2, *s[1:]), random(s[0], 2), 1.5, col=random(s[1]) + 1),
    "ia3": lambda s: Scaling(row=random(s[0]) + 1),
    "ia3_in": lambda s: Scaling(col=random(s[1]) + 1),
    "lokr": _lokr,
    "full": lambda s: WeightUpdate("full", added(random(*s)), s, bias=random(s[0])),
}


def refused(layer: str, kind: str) -> bool:
    """What has no form: an embedding reads ids, and a grouped convolution has no whole weight."""
    grouped = layer == "conv2d_grouped" and kind in ("dora", "rows", "cols")
    return grouped or (layer == "embedding" and kind in ("cols", "ia3_in"))


# The columns of a grouped weight are not the inputs of the layer.
CASES = [c for c in ((a, b) for a in LAYERS for b in KINDS) if c != ("conv2d_grouped", "ia3_in")]


def weight_of(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None, bool]:
    """The stored weight and bias, and whether the weight is stored as (in, out)."""
    layer: Any = model.layer
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight, layer.in_proj_bias, False
    return layer.weight, getattr(layer, "bias", None), isinstance(layer, Conv1D | nn.Embedding)


def merged(model: nn.Module, update: AnyUpdate) -> nn.Module:
    """The weight form, put into a copy of the model."""
    tuned = copy.deepcopy(model)
    weight, bias, transposed = weight_of(tuned)
    with torch.no_grad():
        new = update.weight(weight.T if transposed else weight)
        weight.copy_(new.T if transposed else new)
        shift = None if isinstance(update, Scaling) else update.bias
        if shift is not None:
            extra = shift * (update.scale if isinstance(update, Update) else 1)
            if bias is None:
                tuned.layer.register_forward_hook(lambda m, a, y: y + along(extra, weight))
            else:
                bias += extra
        if isinstance(update, Scaling) and update.row is not None and bias is not None:
            bias *= update.row
    return tuned


def along(vector: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return vector.reshape(-1, *[1] * (weight.ndim - 2))


@functools.cache
def base(layer: str) -> tuple[nn.Module, fx.GraphModule]:
    """A model and its graph: only read."""
    torch.manual_seed(0)
    model = LAYERS[layer]().eval()
    frontend = "export" if "attention" in layer or "same" in layer else "auto"
    dynamic = ({0: "batch"},)
    return model, trace(model, (example(layer),), dynamic_shapes=dynamic, frontend=frontend)


def built(layer: str, kind: str) -> tuple[nn.Module, AnyUpdate, fx.GraphModule]:
    model, gm = base(layer)
    weight, _, transposed = weight_of(model)
    return model, KINDS[kind](tuple(weight.T.shape if transposed else weight.shape)), gm


@pytest.mark.parametrize(("layer", "kind"), CASES)
def test_the_graph_form_is_the_weight_form(layer: str, kind: str) -> None:
    model, update, gm = built(layer, kind)
    adapter, x = Adapter("a", {"layer": update}), example(layer, 6)
    if refused(layer, kind):
        with pytest.raises(AdapterError, match="adapter a, layer: "):
            inject(gm, adapter)
        return
    injected = inject(gm, adapter)
    # Rows that are read from one weight are layers of their own once folded.
    folded = fold(injected) if "crossed" in layer else folds_to(injected, gm)
    assert not operators(folded) - operators(gm)
    with torch.no_grad():
        wanted = merged(model, update)(x)
        assert relative(injected(x), wanted) <= 1e-6
        assert relative(folded(x), wanted) <= 1e-5
        assert relative(gm(x), wanted) > 1e-2
    stripped = StripLora()(injected)
    assert stripped.modified
    assert text(stripped.graph_module) == text(gm)
    assert [site.path for site in sites(injected)] == [site.path for site in sites(gm)]


@pytest.mark.parametrize(("layer", "kind"), [c for c in CASES if not refused(*c)])
def test_what_was_injected_is_read_back(layer: str, kind: str) -> None:
    _, update, gm = built(layer, kind)
    injected = inject(gm, Adapter("a", {"layer": update}))
    if isinstance(update, WeightUpdate) or (layer == "conv2d_grouped" and kind[:4] == "lora"):
        with pytest.raises(AdapterError, match=r"made .* anew"):
            adapter_from(injected)
        return
    read = adapter_from(injected)
    assert len(branches(injected)) == 2 if "crossed" in layer else 1
    x = example(layer, 6)
    again = inject(gm, read)
    with torch.no_grad():
        assert relative(again(x), injected(x)) <= 1e-6
        assert relative(gm(x), injected(x)) > 1e-2


@pytest.mark.parametrize("layer", ["linear", "conv2d", "embedding", "transposed"])
def test_two_adapters_are_summed_and_taken_away_alone(layer: str) -> None:
    model, _, gm = built(layer, "lora")
    weight, _, transposed = weight_of(model)
    shape = tuple(weight.T.shape if transposed else weight.shape)
    one, two = (Adapter(n, {"layer": KINDS[k](shape)}) for n, k in (("a", "dora"), ("b", "lora")))
    both = inject(gm, [one, two])
    with torch.no_grad():
        base = weight.T if transposed else weight
        total = one.updates["layer"].weight(base) + two.updates["layer"].weight(base) - base
        tuned = copy.deepcopy(model)
        weight_of(tuned)[0].copy_(total.T if transposed else total)
        x = example(layer, 6)
        assert relative(both(x), tuned(x)) <= 1e-6
        assert relative(fold(both)(x), tuned(x)) <= 1e-5
        assert relative(inject(gm, one)(x), tuned(x)) > 1e-2
    assert text(StripLora("b")(both).graph_module) == text(inject(gm, one))
    assert text(StripLora("a")(both).graph_module) == text(inject(gm, two))


@pytest.mark.parametrize(
    "kinds",
    [
        ("ia3_in", "dora"),
        ("dora", "ia3_in"),
        ("ia3_in", "ia3_in"),
        ("ia3_in", "lokr"),
        ("lokr", "ia3_in"),
        ("lokr", "dora"),
        ("ia3", "lokr"),
    ],
)
def test_what_has_no_sum_is_refused(kinds: tuple[str, str]) -> None:
    _, _, gm = built("linear", "lora")
    one, two = (Adapter(n, {"layer": KINDS[k]((5, 3))}) for n, k in zip("ab", kinds, strict=True))
    with pytest.raises(AdapterError, match=r"layer: .*fold the first"):
        inject(gm, [one, two])
    folded = inject(fold(inject(gm, one)), two)
    assert folded is not None


class Twice(nn.Linear):
    """Calls its weight with its bias, and once more without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * F.linear(2 * x, self.weight)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::lora_fx.errors.AdapterWarning")  # PEFT has no such bias
def test_a_bias_is_added_where_the_layer_adds_its_own() -> None:
    model, x = nn.Sequential(Twice(3, 5)).eval(), random(4, 3)
    update = Update(random(2, 3), random(5, 2), 1.5, bias=random(5))
    tuned = inject(trace(model, (x,)), Adapter("a", {"0": update}))
    wanted = copy.deepcopy(model)
    wanted[0].weight += update.delta()
    without = relative(tuned(x), wanted(x))
    wanted[0].bias += update.scale * random(5)
    assert relative(tuned(x), wanted(x)) < 1e-6 < 1e-2 < without
    assert relative(fold(tuned)(x), wanted(x)) < 1e-6
    read = adapter_from(tuned).updates["0"]
    assert isinstance(read, Update)
    assert read.bias is not None
