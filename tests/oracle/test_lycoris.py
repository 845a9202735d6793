"""LyCORIS' files, LyCORIS being writer, reader and oracle.

Its outputs are those of the wrapped model: 4.1.3's own merge applies the scale of LoHa and LoKr
twice (``get_diff_weight`` multiplies what ``get_weight`` has scaled), its forward once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import relative

lycoris = pytest.importorskip("lycoris")
X = torch.linspace(-1, 1, 4 * 3 * 6 * 7, dtype=torch.float64).reshape(4, 3, 6, 7)
Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    """Convolutions of a plane and of a line, one of them grouped, norms and linear layers."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, (3, 3), padding=1)
        self.norm_in = nn.GroupNorm(2, 8)
        self.down = nn.ModuleList([nn.Conv2d(8, 6, 3, stride=2, groups=groups, bias=False)])
        self.point = nn.Conv2d(6, 4, 1)
        self.line = nn.Conv1d(4, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.to_q = nn.Linear(6, 10, bias=False)
        self.out = nn.ModuleDict({"to_out": nn.Linear(10, 9)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm_in(self.conv_in(x)))
        x = torch.tanh(self.point(torch.tanh(self.down[0](x)))).mean(2)
        x = self.norm(self.line(x).mean(2))
        result: torch.Tensor = self.out["to_out"](torch.tanh(self.to_q(x)))
        return result


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """LyCORIS tells its log which classes of layers a model has none of."""
    logger = logging.getLogger("LyCORIS")
    logger.disabled = True
    yield
    logger.disabled = False


def seeded(case: str = "", **options: Any) -> Net:
    """The base; LyCORIS' OFT computes in float32 alone."""
    torch.manual_seed(0)
    return Net(**options).eval().to(torch.float32 if "oft" in case else torch.float64)


def wrapped(model: Net, seed: int = 1, **options: Any) -> Any:
    """A network around a model, applied to it, as if trained."""
    fields = {"linear_dim": 3, "linear_alpha": 2.5, "conv_dim": 2, "conv_alpha": 5.0, **options}
    network = lycoris.create_lycoris(model, 1.0, preset="full", warn_on_unmatched=False, **fields)
    dtype = model.conv_in.weight.dtype
    network.apply_to()
    network.to(dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif not name.endswith(("weight", "bias")) or "lora_" in name or "ia3" in str(options):
                parameter.normal_(0.0, 0.5)
            else:  # a full weight, which holds the base's already
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def written(path: Path, network: Any, dtype: torch.dtype | None = None) -> Path:
    network.save_weights(str(path), dtype, {})
    return path


def updated(model: Net, adapter: Adapter) -> Net:
    """The model with every update's weight form in place of its parameters."""
    with torch.no_grad():
        for path, update in adapter.updates.items():
            module = model.get_submodule(path if update.kind != "norm" else path.rpartition(".")[0])
            name = path.rpartition(".")[2] if update.kind == "norm" else "weight"
            parameter: Any = getattr(module, name)
            parameter.copy_(update.weight(parameter))
            bias = getattr(update, "bias", None)
            if bias is not None:
                assert isinstance(module.bias, nn.Parameter)
                module.bias.add_(bias)
    return model


LOW, INPUTS = {"linear_dim": 1, "conv_dim": 1}, {"dora_wd": True, "wd_on_output": False}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with norms": {"train_norm": True},
    "lora in Tucker form": {"use_tucker": True},
    "lora of rank 1": {**LOW, "linear_alpha": 1},
    "lora without alpha": {"linear_alpha": 0, "conv_alpha": 0},
    "dora": {"dora_wd": True},
    "dora in Tucker form": {"dora_wd": True, "use_tucker": True},
    "dora of the inputs": INPUTS,
    "loha": {},
    "loha in Tucker form": {"use_tucker": True},
    "loha with dora": {"dora_wd": True},
    "loha with dora of the inputs": INPUTS,
    "lokr": LOW,
    "lokr of full factors": {"full_matrix": True},
    "lokr of four factors": {**LOW, "decompose_both": True, "factor": 4},
    "lokr in Tucker form": {**LOW, "use_tucker": True},
    "lokr with dora": {**LOW, "dora_wd": True},
    "lokr with dora of the inputs": {**LOW, **INPUTS},
    "glora": {},
    "full": {},
    "full with norms": {"train_norm": True},
    "diag-oft": {},
    "diag-oft that is rescaled": {"rescaled": True},
    "diag-oft that is constrained": {"constraint": 0.01},
    "ia3": {},
}


def options_of(case: str) -> dict[str, Any]:
    algorithm = case.split()[0].replace("dora", "lora")
    return {"algo": algorithm, **ALGORITHMS[case]}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(X.to(next(model.parameters())))
    return result


def file_of(path: Path, case: str, **options: Any) -> tuple[Path, torch.Tensor]:
    """A file of one algorithm, and what LyCORIS computes with it."""
    model = seeded(case, **options)
    network = wrapped(model, **options_of(case))
    dtype = torch.float32 if "oft" in case else torch.float64
    # on_input is an integer otherwise, which a file of adapters has none of but alphas
    return written(path, network, dtype), outputs(model)


@functools.cache
def traced(groups: int, dtype: torch.dtype) -> Any:
    """The graph of a base: only read."""
    return lora_fx.trace(seeded(groups=groups).to(dtype), (X.to(dtype),))


# LyCORIS' GLoRA of a convolution in groups fails in its own forward.
EVERY = [
    (case, groups) for case in ALGORITHMS for groups in (1, 2) if (case, groups) != ("glora", 2)
]


@pytest.mark.parametrize(("case", "groups"), EVERY)
def test_weights_and_graphs_are_those_of_lycoris(tmp_path: Path, case: str, groups: int) -> None:
    file, expected = file_of(tmp_path / "a.safetensors", case, groups=groups)
    base = seeded(case, groups=groups)
    adapter = load_adapter(file, base=seeded(groups=groups))
    layers = {"conv_in", "down.0", "point", "line", "to_q", "out.to_out"}
    norms = {f"{norm}.{name}" for norm in ("norm", "norm_in") for name in ("weight", "bias")}
    assert set(adapter.updates) == layers | (norms if "norms" in case else set())
    assert relative(outputs(base), expected) > 1e-2
    assert relative(outputs(updated(base, adapter)), expected) <= 1e-6

    x = X.to(base.conv_in.weight.dtype)
    gm = traced(groups, x.dtype)
    by_graph = load_adapter(file, base=gm)
    tuned = lora_fx.inject(gm, by_graph)
    assert relative(tuned(x), expected) <= 1e-6
    assert relative(lora_fx.fold(tuned)(x), expected) <= 1e-5
    assert relative(gm(x), expected) > 1e-2
    if groups == 1:  # onnxruntime has convolutions for float32
        single = lora_fx.fold(lora_fx.inject(traced(1, torch.float32), by_graph))
        lora_fx.to_onnx(single, tmp_path / "m.onnx")
        (found,) = lora_fx.Session(tmp_path / "m.onnx").run({"x": x.float()}).values()
        assert relative(torch.from_numpy(found), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ALGORITHMS)
def test_load_save_load_keeps_every_bit(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    groups = 1 if case == "glora" else 2
    file = written(
        tmp_path / "a.safetensors", wrapped(seeded(case, groups=groups), **options_of(case)), dtype
    )
    adapter = load_adapter(file, base=seeded(groups=groups))
    save_adapter(adapter, tmp_path / "b.safetensors", format="kohya", component="lycoris")
    first, second = load_file(file), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        is_number = key.endswith(".alpha") and case.startswith(("lora", "dora"))
        assert is_number or tensor.dtype == second[key].dtype
        assert tensor.shape == second[key].shape
        assert torch.equal(tensor, second[key].to(tensor.dtype)), key


@pytest.mark.parametrize("case", [case for case in ALGORITHMS if case != "ia3"])
def test_lycoris_computes_the_same_from_what_is_written(tmp_path: Path, case: str) -> None:
    """LyCORIS itself loads no (IA)3: it makes a module of two tensors from one."""
    file, expected = file_of(tmp_path / "a.safetensors", case)
    again = tmp_path / "b.safetensors"
    save_adapter(load_adapter(file, base=seeded()), again, format="kohya", component="lycoris")
    model = seeded(case)
    network = wrapped(model, seed=2, **options_of(case))
    assert relative(outputs(model), expected) > 1e-2
    # a network that is applied adds a full difference to what it holds: start from the base
    if case.startswith("full"):
        for lora in network.loras:
            if hasattr(lora, "weight"):
                lora.weight.data.copy_(lora.org_weight)
                if lora.bias is not None:
                    lora.bias.data.copy_(lora.org_bias[0])
    assert "unexpected keys" not in network.load_weights(str(again))
    assert relative(outputs(model), expected) <= 1e-6


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_", "lora_te1_"])
def test_the_names_of_a_pipeline_mean_the_same(tmp_path: Path, prefix: str) -> None:
    file, _ = file_of(tmp_path / "b.safetensors", "loha")
    state = {key.replace("lycoris_", prefix): value for key, value in load_file(file).items()}
    save_file(state, tmp_path / "a.safetensors")
    one, other = (load_adapter(tmp_path / f"{name}.safetensors", base=seeded()) for name in "ba")
    assert one.updates.keys() == other.updates.keys()
    weight = seeded().to_q.weight
    assert torch.equal(one.updates["to_q"].weight(weight), other.updates["to_q"].weight(weight))


def test_a_rank_stabilised_scale_is_in_alpha(tmp_path: Path) -> None:
    model = seeded()
    network = lycoris.LycorisNetwork(
        model, 1.0, 3, 2, 2.5, 5.0, network_module="locon", rs_lora=True
    )
    network.apply_to()
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.5)
    file = written(tmp_path / "a.safetensors", network)
    adapter = load_adapter(file, base=seeded())
    assert adapter.updates["to_q"].scale == pytest.approx(2.5 / 3**0.5)
    assert relative(outputs(updated(seeded(), adapter)), outputs(model)) <= 1e-6


def test_an_algorithm_that_is_not_supported_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # T-LoRA collects garbage for each layer that it makes: here, that of all tests before.
    monkeypatch.setattr("gc.collect", lambda: 0)
    file = written(tmp_path / "a.safetensors", wrapped(seeded(), algo="tlora"))
    with pytest.raises(AdapterError, match="' is T-LoRA, which is not supported"):
        load_adapter(file, base=seeded())


def test_glora_of_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", wrapped(seeded(groups=2), algo="glora"))
    with pytest.raises(AdapterError, match=r"the GLoRA factors make \(.*, the layer is \("):
        load_adapter(file, base=seeded(groups=2))


def test_a_scale_that_changed_is_written(tmp_path: Path) -> None:
    file, _ = file_of(tmp_path / "a.safetensors", "loha")
    adapter = load_adapter(file, base=seeded())
    louder: Any = {path: replace(u, scale=2 * u.scale) for path, u in adapter.updates.items()}
    save_adapter(Adapter("a", louder), tmp_path / "b.safetensors", format="kohya", component="unet")
    found = load_adapter(tmp_path / "b.safetensors", base=seeded())
    assert {p: u.scale for p, u in found.updates.items()} == {p: u.scale for p, u in louder.items()}


BUTTERFLY: dict[str, dict[str, Any]] = {
    "plain": {}, "rescaled": {"rescaled": True}, "constrained": {"constraint": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("case", BUTTERFLY)
def test_a_butterfly_turns_rows_that_lie_further_and_further_apart(
    case: str, size: int, tmp_path: Path
) -> None:
    def seeded() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16)).eval()

    base, model, x = seeded(), seeded(), torch.randn(5, 3, 4, 4)
    sizes = {"linear_dim": size, "conv_dim": size, "linear_alpha": 1, "conv_alpha": 1}
    network = lycoris.create_lycoris(
        model, 1.0, preset="full", warn_on_unmatched=False, algo="boft", **sizes, **BUTTERFLY[case]
    )
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    want = model(x).detach()
    adapter = load_adapter(written(tmp_path / "a.safetensors", network.eval()), base=base)
    save_adapter(adapter, tmp_path / "b.safetensors", format="kohya", component="lycoris")
    gm = lora_fx.trace(base, (x,))
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        injected = lora_fx.inject(gm, load_adapter(path, base=base))
        assert relative(injected(x), want) <= 1e-6
        assert relative(lora_fx.fold(injected)(x), want) <= 1e-6
    assert relative(base(x), want) > 1e-2  # the control
