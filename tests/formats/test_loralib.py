"""loralib's state dicts of every class of its layers; loralib is writer, reader and oracle.

Its convolutions of a line or a volume work for kernels of one point alone: the product of its two
matrices has as many numbers as the weight of a convolution of a plane.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import lora_fx
from lora_fx.adapters.adapter import Adapter, Update, WeightUpdate
from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.dialects import sort_keys
from lora_fx.formats.hints import Hints
from lora_fx.formats.loralib import ALPHAS, DIALECT, LoralibFile, groups_of
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import relative, same_adapter, same_tensors

PLANE = torch.linspace(-1, 1, 4 * 6 * 5 * 7, dtype=torch.float64).reshape(4, 6, 5, 7)
IDS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8]])
R2: dict[str, Any] = {"r": 2, "lora_alpha": 3}
R1: dict[str, Any] = {"r": 1, "lora_alpha": 3}
HIGH: dict[str, Any] = {"r": 3, "lora_alpha": 5}
TURNED, GROUPED = {"fan_in_fan_out": True}, {"groups": 2}


class Net(nn.Module):
    """Two layers that are adapted, a norm that may be trained, and a layer of torch's."""

    def __init__(self, layer: nn.Module, out: int, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleList([layer, last])
        self.norm = nn.LayerNorm(out)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body[0](x)
        x = x if x.shape[-1] == self.norm.normalized_shape[0] else x.flatten(2).mean(2)
        x = self.body[1](torch.tanh(self.norm(x)))
        result: torch.Tensor = self.head(torch.tanh(x))
        return result


# The class, of loralib as of torch, what both take, what loralib's takes, an input, and
# what the pair becomes.
Case = tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any], torch.Tensor, type]
CASES: dict[str, Case] = {
    "embedding": ("Embedding", (11, 5), {}, R2, IDS, Update),
    "linear": ("Linear", (7, 5), {}, R2, PLANE, Update),
    "linear, turned": ("Linear", (7, 5), {}, R2 | TURNED, PLANE, Update),
    "conv2d": ("Conv2d", (6, 4, 3), {"stride": 2, "padding": 1}, R1, PLANE, Update),
    "conv2d of a high rank": (
        "Conv2d", (6, 4, 3), {"dilation": 2, "bias": False}, HIGH, PLANE, WeightUpdate,
    ),
    "conv2d in groups": ("Conv2d", (6, 4, 3), GROUPED, R1, PLANE, WeightUpdate),
    "conv2d of a point": ("Conv2d", (6, 4, 1), {}, R2, PLANE, Update),
    "conv1d of a point": ("Conv1d", (6, 4, 1), {}, R2, PLANE.flatten(2), Update),
    "conv3d of a point": ("Conv3d", (6, 4, 1), {}, R2, PLANE[:, :, None], Update),
}  # fmt: skip
T, F = True, False
for enabled in ([T, F, T], [T, T, T], [F, T, F], [F, T, T]):
    for name, more in (("fused", {}), ("fused, turned", TURNED)):
        of = HIGH | {"enable_lora": enabled} | more
        CASES[f"{name} {enabled}"] = ("MergedLinear", (7, 15), {}, of, PLANE, Update)


def owner(case: str) -> Net:
    """loralib's model, as if trained, in training mode: nothing is merged."""
    name, sizes, options, adapted, _, _ = CASES[case]
    torch.manual_seed(0)
    last = loralib.Linear(sizes[1], 5, r=2, lora_alpha=adapted["lora_alpha"])
    model = Net(getattr(loralib, name)(*sizes, **options, **adapted), sizes[1], last).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7)
    return model


def base_of(case: str) -> Net:
    """torch's model with the owner's weights."""
    name, sizes, options, *_ = CASES[case]
    layer = getattr(nn, name.removeprefix("Merged"))(*sizes, **options)
    base, state = Net(layer, sizes[1], nn.Linear(sizes[1], 5)).double(), {}
    for key, value in owner(case).state_dict().items():
        if "lora_" not in key:
            turned = "turned" in case and key == "body.0.weight"
            state[key.replace(".conv.", ".")] = value.T if turned else value
    base.load_state_dict(state)
    return base.eval()


@functools.cache
def based(case: str, shift: float) -> tuple[Net, fx.GraphModule]:
    """torch's model, its norm's bias moved, and its graph: only read."""
    base = base_of(case)
    with torch.no_grad():
        base.norm.bias.add_(shift)
    return base, lora_fx.trace(base, (CASES[case][-2],))


def hints_of(case: str) -> dict[str, Any]:
    adapted = CASES[case][3]
    fused = {"enable_lora": {"body.0": adapted["enable_lora"]}} if "enable_lora" in adapted else {}
    rank = {"r": 2} if adapted["r"] == 2 else {}  # the last layer's too
    return {"alpha": adapted["lora_alpha"], **fused, **rank}


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def run(case: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(CASES[case][-2])
    return result


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_graphs_are_those_of_loralib(tmp_path: Path, case: str, name: str) -> None:
    model, (base, gm) = owner(case), based(case, 0.0)
    file = write(tmp_path / name, loralib.lora_state_dict(model))
    expected, hints = run(case, model), hints_of(case)
    for known in (base, gm):
        adapter = load_adapter(file, base=known, allow_pickle=True, **hints)
        assert {p: type(u) for p, u in adapter.updates.items()} == {
            "body.0": CASES[case][-1], "body.1": Update,
        }  # fmt: skip
        tuned = lora_fx.inject(gm, adapter)
        assert relative(run(case, tuned), expected) <= 1e-6
        assert relative(run(case, lora_fx.fold(tuned)), expected) <= 1e-6
    louder = load_adapter(
        file, base=base, allow_pickle=True, **{**hints, "alpha": 1.1 * hints["alpha"]}
    )
    assert relative(run(case, lora_fx.inject(gm, louder)), expected) > 1e-3
    assert relative(run(case, base), expected) > 1e-2
    base = copy.deepcopy(base)
    for path, update in adapter.updates.items():
        weight: Any = base.get_parameter(f"{path}.weight").data
        weight = weight.T if case == "embedding" and path == "body.0" else weight
        weight.copy_(update.weight(weight))
    assert relative(run(case, base), expected) <= 1e-6


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_whole_state_dict_says_the_same(
    tmp_path: Path, case: str, with_base: bool, mode: str
) -> None:
    """In evaluation mode loralib has merged the update into the weight."""
    model, (base, gm) = owner(case), based(case, 1.0)
    expected = run(case, model)
    model.train(mode == "train")
    file = write(tmp_path / "a.safetensors", model.state_dict())
    adapter = load_adapter(file, **hints_of(case), **({"base": base} if with_base else {}))
    others = {key for key, _ in base.named_parameters()} - {"body.0.weight", "body.1.weight"}
    assert set(adapter.replacements) == ({"norm.bias"} if with_base else others)
    assert relative(run(case, lora_fx.inject(gm, adapter)), expected) <= 1e-6
    assert relative(run(case, gm), expected) > 1e-2


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv1d of a point", "embedding"])
def test_biases_are_replaced(tmp_path: Path, case: str, bias: str) -> None:
    model, base = owner(case), base_of(case)
    file = write(tmp_path / "a.safetensors", loralib.lora_state_dict(model, bias=bias))
    adapter = load_adapter(file, alpha=3, base=base)
    # a convolution's own bias is its child's, which loralib does not find beside the factors
    kept = {"body.1.bias"} | ({"body.0.bias"} if case == "linear" else set())
    every = {key for key, _ in base.named_parameters() if key.endswith("bias")}
    assert set(adapter.replacements) == (kept if bias == "lora_only" else every)
    expected = run(case, model)
    with torch.no_grad():
        for key in adapter.replacements:
            base.get_parameter(key).add_(1.0)
    gm = lora_fx.trace(base, (CASES[case][-2],))
    assert relative(run(case, lora_fx.inject(gm, adapter)), expected) <= 1e-6
    alone = Adapter("a", adapter.updates)
    assert relative(run(case, lora_fx.inject(gm, alone)), expected) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_load_save_load_keeps_every_bit(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    base = base_of(case).to(dtype)
    bias = "none" if "conv" in case else "all"
    state = loralib.lora_state_dict(owner(case).to(dtype), bias=bias)
    hints = hints_of(case)
    adapter = load_adapter(write(tmp_path / "a.safetensors", state), base=base, **hints)
    save_adapter(adapter, tmp_path / "b.safetensors", format="loralib")
    same_tensors(load_file(tmp_path / "b.safetensors"), state)
    again = load_adapter(tmp_path / "b.safetensors", base=base)
    for path, update in adapter.updates.items():
        assert all(map(torch.equal, again.updates[path].tensors(), update.tensors()))
        weight = base.get_parameter(f"{path}.weight").detach()
        weight = weight.T if case == "embedding" and path == "body.0" else weight
        assert torch.equal(again.updates[path].weight(weight), update.weight(weight))
    if "fused" in case:
        with pytest.raises(AdapterError, match="says what is fused; leave the hint enable_lora"):
            load_adapter(tmp_path / "b.safetensors", enable_lora=hints["enable_lora"])
    save_adapter(adapter, tmp_path / "b.pt", format="loralib")
    same_tensors(torch.load(tmp_path / "b.pt", weights_only=True), state)
    with pytest.raises(AdapterError, match="loralib stores no alpha"):
        load_adapter(tmp_path / "b.pt", allow_pickle=True)


def test_a_fused_layer_keeps_the_scale_of_one_output(reads: Any) -> None:
    state = loralib.lora_state_dict(owner("fused [True, False, True]"))
    update = reads(state, alpha=5, enable_lora=[T, F, T]).updates["body.0"]
    assert isinstance(update, Update)
    assert (update.rank, update.scale, update.shape) == (6, 5 / 3, (15, 7))
    assert not update.up[5:10].any()


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (1,)])
def test_any_square_convolution_of_two_factors_can_be_written(
    rewritten: Any, kernel: tuple[int, ...]
) -> None:
    make = torch.Generator().manual_seed(0)
    shape = (2, 6, *kernel)
    update = Update(torch.randn(shape, generator=make), torch.randn(4, 2, generator=make), 1.5)
    adapter = Adapter("a", {"body.0": update})
    size = len(kernel)
    base = nn.ModuleDict({"body": nn.ModuleList([(nn.Conv1d, nn.Conv2d)[size - 1](6, 4, kernel)])})
    written, again = rewritten(adapter, "loralib", base)
    same_adapter(again, adapter)
    layer = (loralib.Conv1d, loralib.Conv2d)[size - 1](6, 4, kernel[0], r=2, lora_alpha=3)
    state = {key.removeprefix("body.0."): tensor for key, tensor in written.items()}
    assert not layer.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(4, 6, *[5] * size, generator=make)
    expected = copy.deepcopy(layer.conv)
    with torch.no_grad():
        expected.weight.copy_(update.weight(expected.weight))
        assert relative(layer(x), expected(x)) <= 1e-6
        assert relative(layer.conv(x), expected(x)) > 1e-2


def test_a_base_that_is_another_is_refused(reads: Any) -> None:
    state, base = owner("conv2d").state_dict(), base_of("conv2d")
    with torch.no_grad():
        base.get_parameter("body.0.weight").mul_(1.1)
    message = r"body\.0\.weight is neither the base's nor that with this update merged into it"
    with pytest.raises(AdapterError, match=message):
        reads(state, alpha=3, base=base)
    with pytest.warns(AdapterWarning, match=message):
        reads(state, alpha=3, base=base, strict=False)


A, B = torch.ones(2, 3), torch.ones(5, 2)
PAIR = {"fc.lora_A": A, "fc.lora_B": B}


def test_alphas_are_of_all_layers_or_of_each(tmp_path: Path) -> None:
    pairs = PAIR | {"b.fc.lora_A": A + 1, "b.fc.lora_B": B + 1}
    file = write(tmp_path / "a.safetensors", pairs)
    found = load_adapter(file, alpha={"b.fc": 3, "fc": 5}).updates
    assert {path: u.scale for path, u in found.items()} == {"b.fc": 1.5, "fc": 2.5}
    save_file(PAIR, file, metadata={ALPHAS: '{"fc": 3}'})
    assert load_adapter(file).updates["fc"].scale == 1.5


def test_rslora_is_written_as_the_alpha_of_its_scale(rewritten: Any) -> None:
    pair = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(-1, 1, 15).reshape(5, 3)
    adapter = Adapter("a", {"fc": Update(*pair, 16 / 3**0.5, "rslora")})
    same_adapter(rewritten(adapter, "loralib")[1], adapter)


def test_a_pickle_holds_one_alpha(tmp_path: Path) -> None:
    several = {"fc": Update(A, B, 1.5), "up": Update(A, B, 2.0)}
    with pytest.raises(AdapterError, match=r"several alphas \(fc: 3, up: 4\): write .safetensors"):
        save_adapter(Adapter("a", several), tmp_path / "a.pt", format="loralib")
    save_adapter(Adapter("a", several), tmp_path / "a.safetensors", format="loralib")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    save_adapter(Adapter("a", {"fc": several["fc"]}), tmp_path / "a.pt", format="loralib")
    found = load_adapter(tmp_path / "a.pt", alpha=3, allow_pickle=True)
    same_adapter(found, Adapter("a", {"fc": several["fc"]}))


WEIGHT = {"fc.weight": torch.ones(5, 3)}
NORM = {"norm.weight": torch.ones(5), "norm.bias": torch.zeros(5)}
CHILD = {"fc.conv.weight": torch.ones(5, 3, 1), "fc.conv.bias": torch.ones(5)}
FC = nn.ModuleDict({"fc": nn.Linear(3, 5), "norm": nn.LayerNorm(5)})
HALVED = NORM | {"norm.bias": torch.full((5,), 0.5)}


@pytest.mark.parametrize(
    ("base", "more", "weights", "replaced"),
    [
        (None, {"fc.bias": torch.ones(5)}, [], ["fc.bias"]),
        (None, WEIGHT | NORM, ["fc"], ["norm.weight", "norm.bias"]),
        (None, CHILD | {"other.conv.bias": torch.ones(5)}, ["fc"], ["fc.bias", "other.conv.bias"]),
        (FC, WEIGHT | NORM, ["fc"], []),
        (FC, WEIGHT | HALVED, ["fc"], ["norm.bias"]),
        (FC, {k: v.half() for k, v in (WEIGHT | HALVED).items()}, ["fc"], ["norm.bias"]),
        (FC, {"norm.bias": NORM["norm.bias"]}, [], ["norm.bias"]),
    ],
    ids=["an adapter", "a model", "a convolution's child", "what a base has", "a trained norm",
         "in half precision", "biases of all layers"],
)  # fmt: skip
def test_an_adapter_is_told_from_a_whole_model(
    base: nn.Module | None, more: dict[str, torch.Tensor], weights: list[str], replaced: list[str]
) -> None:
    found = LoralibFile(layers_of(base))
    found.layers = sort_keys(PAIR | more, DIALECT, found.claim)
    assert list(found.layers) == ["fc"]
    assert list(found.weights) == weights
    assert list(found.replacements) == replaced


def groups(enabled: list[bool], hint: Any, base: int | None = None) -> Any:
    down, up = torch.ones(2 * sum(enabled), 3), torch.ones(5 * sum(enabled), 2)
    return groups_of("a.qkv", down, up, Hints(enable_lora=hint), base)[0]


@pytest.mark.parametrize("enabled", [[T, T], [T, F, T], [T, T, T], [F, T, F, T, T]], ids=str)
def test_a_list_is_of_every_fused_layer(enabled: list[bool]) -> None:
    for hint, base in ((enabled, None), ({"qkv": enabled}, None), (enabled, 5 * len(enabled))):
        assert groups(enabled, hint, base) == tuple(enabled)


def test_one_adapted_output_is_told_by_the_base_or_by_name() -> None:
    for hint, base in ((None, None), ([T, F, T], None), ({"other": [T, F]}, None), ([T, F], 5)):
        assert groups([T], hint, base) is None  # a layer of one output is not fused
    assert groups([F, T], [F, T], base=10) == groups([F, T], {"qkv": [F, T]}) == (F, T)


@pytest.mark.parametrize(
    ("enabled", "hint", "base", "message"),
    [
        ([F, T], [F, T], None, r"a\.qkv may be fused or not; pass base="),
        ([T, F, T], None, None, "fused layer .* with 2 adapted outputs; pass"),
        ([T, T], [T, T, T], None, "2 outputs are adapted, .* says 3"),
        ([T, T, T], {"qkv": [T, F, T]}, None, "3 outputs .* says 2"),
        ([T, T], [T, T], 15, "an output of 10, the base's is of 15"),
        ([F, T], None, 10, "no enable_lora of an output of 5, the base's is of 10"),
        ([T, T], [F, F], None, "expected a list of bools, one T"),
        ([T, T], [1, 1], None, "expected a list of bools"),
        ([T, T], {"qkv": "TT"}, None, "expected a list of bools"),
        ([T, T], T, None, "expected a list of bools"),
    ],
)
def test_a_hint_that_does_not_fit_is_refused(
    enabled: list[bool], hint: Any, base: int | None, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        groups(enabled, hint, base)


@pytest.mark.parametrize(("down", "up"), [((3, 4), (5, 2)), ((1, 4), (5, 2)), ((4, 3), (5, 2))])
def test_ranks_that_differ_are_refused(down: Any, up: Any) -> None:
    hints = Hints(enable_lora=[T, T])
    with pytest.raises(AdapterError, match="the ranks differ"):
        groups_of("fc", torch.ones(down), torch.ones(up), hints, None)


def litgpt(name: str, groups: int) -> tuple[Any, str]:
    """A layer of four heads of eight, whose keys and values are in groups, and its path."""
    out = 4 * 8 + 2 * groups * 8
    net: Any = nn.ModuleDict({"h": nn.Sequential(nn.ModuleDict())})
    net.h[0]["attn"] = nn.ModuleDict({name: nn.Linear(5, out, bias=False)})
    net.config = SimpleNamespace(n_head=4, n_query_groups=groups, head_size=8)
    return net, f"h.0.attn.{name}"


@pytest.mark.parametrize("groups", [4, 1, 2])
@pytest.mark.parametrize("enabled", [[T, T, T], [T, F, T], [F, T, T], [T, F, F], [F, T, F]])
def test_what_litgpt_fuses_has_outputs_of_several_sizes(
    reads: Any, rewritten: Any, groups: int, enabled: list[bool]
) -> None:
    """Of one group, 48 rows are 32, 8 and 8 of them, and not three times 16."""
    net, path = litgpt("qkv", groups)
    sizes = [32, 8 * groups, 8 * groups]
    own = [size for size, on in zip(sizes, enabled, strict=True) if on]
    down, up = torch.randn(2 * len(own), 5), torch.randn(sum(own), 2)
    tensors = {f"{path}.lora_A": down, f"{path}.lora_B": up}
    weight = torch.randn(sum(sizes), 5)
    parts = iter(zip(up.split(own), down.split(2), strict=True))
    products = []
    for size, on in zip(sizes, enabled, strict=True):
        one, other = next(parts) if on else (torch.zeros(size, 2), torch.zeros(2, 5))
        products.append(one @ other)
    want = weight + 2 * torch.cat(products)
    for hint in (enabled, {path: enabled}):
        adapter = reads(tensors, base=net, alpha=4, enable_lora=hint)
        [update] = adapter.updates.values()
        assert relative(update.weight(weight), want) < 1e-6
        assert relative(weight, want) > 1e-2
        again, _ = rewritten(adapter, "loralib", net)
        same_tensors(again, tensors)
    with pytest.raises(AdapterError, match="pass enable_lora= as its model has it"):
        reads(tensors, base=net, alpha=4, enable_lora={path: [*enabled, F]})


@pytest.mark.parametrize(("name", "has_base"), [("qkv", False), ("attn", True), ("attn", False)])
def test_what_litgpt_fuses_is_told_by_its_own_model(reads: Any, name: str, has_base: bool) -> None:
    net, path = litgpt(name, 1)
    tensors = {f"{path}.lora_A": torch.ones(6, 5), f"{path}.lora_B": torch.ones(48, 2)}
    with pytest.raises(AdapterError, match=r"of litgpt, .* merge it with litgpt merge_lora"):
        reads(tensors, base=net if has_base else None, alpha=4, enable_lora={path: [T, T, T]})


@pytest.mark.parametrize("inside", ["lora", "loras.french", "parametrizations.weight.0"])
def test_a_pair_may_stand_in_a_module_beside_the_weight(reads: Any, inside: str) -> None:
    """As OpenDelta, the library adapters and minLoRA have it; a layer may be called lora too."""
    net = nn.ModuleDict({"lora": nn.ModuleDict({"fc": nn.Linear(3, 5)})})
    down, up = torch.randn(2, 3), torch.randn(5, 2)
    weight = torch.randn(5, 3)
    for key in (f"lora.fc.{inside}", "lora.fc"):
        pair = {f"{key}.lora_A": down, f"{key}.lora_B": up}
        [(path, update)] = reads(pair, base=net, alpha=3).updates.items()
        assert path == "lora.fc"
        assert relative(update.weight(weight), weight + 1.5 * up @ down) < 1e-6
        assert relative(update.weight(weight), weight) > 1e-2
    twice = {**pair, f"lora.fc.{inside}.lora_A": down.clone()}
    with pytest.raises(AdapterError, match=r"are both the down of lora\.fc"):
        reads(twice, base=net, alpha=3)
