"""Wrapped and compiled models are traced as what they wrap, by its own paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.graph.wrappers import bare, named_modules, unwrapped
from lora_fx.numerics import compare


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        self.out = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x))


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of one process: DistributedDataParallel asks for one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def never(graph: object, inputs: object) -> None:
    """A backend that must not be asked: what is traced is what was compiled."""
    raise AssertionError("compiled")


compiled = partial(torch.compile, backend=never)


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend=never)
    return module


def compiled_forward(module: nn.Module) -> nn.Module:
    module.forward = compiled(module.forward)  # type: ignore[method-assign]
    return module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compiled in place": compiled_in_place,
    "compiled forward": compiled_forward,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "checkpoint": checkpoint_wrapper,
    "compiled DistributedDataParallel": lambda module: compiled(
        nn.parallel.DistributedDataParallel(module)
    ),
}
FRONTENDS = ("export", "symbolic")


def inside(wrap: Callable[[nn.Module], nn.Module], net: nn.Module) -> nn.Module:
    net.body = wrap(net.body)
    return net


def around(wrap: Callable[[nn.Module], nn.Module], net: nn.Module) -> nn.Module:
    return wrap(net)


def adapter_of(seed: int = 0) -> lora_fx.Adapter:
    gen = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 3, generator=gen), torch.randn(5, 2, generator=gen)
    return lora_fx.Adapter("a", {"body.0": lora_fx.Update(down, up, 2.0)})


@pytest.mark.parametrize(
    ("name", "frontend", "place"), [*itertools.product(WRAPPERS, FRONTENDS, (around, inside))]
)
def test_layers_are_called_as_in_the_model(
    name: str, frontend: str, place: Callable[..., nn.Module]
) -> None:
    net, x, adapter = Net().eval(), torch.randn(4, 3), adapter_of()
    update = adapter.updates["body.0"]
    weight = net.body[0].weight + update.scale * update.up @ update.down
    want = net.out(torch.relu(nn.functional.linear(x, weight, net.body[0].bias)))
    wrapped = place(WRAPPERS[name], net).eval()
    before = [type(module) for module in wrapped.modules()], set(net.body.__dict__)

    gm = lora_fx.trace(wrapped, (x,), frontend=frontend)
    got = lora_fx.inject(gm, adapter)(x)

    assert compare(got, want).ok
    assert not compare(gm(x), want).ok  # the control: without the adapter
    assert ([type(module) for module in wrapped.modules()], set(net.body.__dict__)) == before


@pytest.mark.parametrize("name", ["compile", "DataParallel"])
def test_a_wrapped_model_is_exported_and_held_against_itself(name: str, tmp_path: object) -> None:
    net, x = inside(WRAPPERS[name], Net().eval()), torch.randn(4, 3)
    gm = lora_fx.trace(WRAPPERS[name](net), (x,))
    report = lora_fx.to_onnx(lora_fx.inject(gm, adapter_of()), f"{tmp_path}/m.onnx")
    assert report.verified
    assert "no module" not in str(report)


def test_a_wrapped_base_resolves_names(tmp_path: object) -> None:
    """kohya's names have no dots: the base's paths tell where they were."""
    path = f"{tmp_path}/a.safetensors"
    lora_fx.save_adapter(adapter_of(), path, format="kohya", component="unet")
    for base in (compiled(Net()), inside(nn.DataParallel, Net())):
        assert list(lora_fx.load_adapter(path, base=base).updates) == ["body.0"]


def test_extract_compares_what_is_wrapped() -> None:
    base = Net()
    averaged = AveragedModel(base)
    with torch.no_grad():
        averaged.module.body[0].weight += torch.ones(5, 3)
    found = lora_fx.extract(base, averaged, rank=1)
    assert list(found.adapter.updates) == ["body.0"]


def test_a_wrapper_that_does_more_is_part_of_the_model() -> None:
    hooked = nn.DataParallel(Net().eval())
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)

    class Doubled(nn.DataParallel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x = torch.randn(4, 3)
    for model in (hooked, Doubled(Net().eval())):
        assert bare(model) is model
        assert compare(lora_fx.trace(model, (x,))(x), model(x)).ok


def test_training_follows_through_a_wrapper() -> None:
    net = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))).eval()
    x = torch.ones(64, 3)
    gm = lora_fx.trace(net, (x,))
    assert torch.equal(gm(x), net(x))
    gm.train()
    assert (gm(x) == 0).any()
    assert isinstance(net[0], nn.DataParallel)


def test_what_is_taken_out_is_put_back_after_an_error() -> None:
    net = inside(compiled, Net())
    wrapper = net.body

    def fails() -> None:
        with unwrapped(net):
            assert net.body is not wrapper
            raise LoraFxError("x")

    with pytest.raises(LoraFxError):
        fails()
    assert net.body is wrapper
    assert [path for path, _ in named_modules(net)] == ["", "body", "body.0", "body.1", "out"]
