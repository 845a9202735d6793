from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lora_fx import fold, trace
from lora_fx.graph.constants import Constants
from lora_fx.graph.graph_module import assign
from lora_fx.testing import relative


class Computes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 2))
        self.b = nn.Parameter(torch.randn(2, 3).half(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> Any:
        weight = (self.a @ self.b.float()).T.contiguous()
        noise = torch.rand_like(self.a)
        picked = self.a[self.a[:, 0] > 0]
        return x @ weight, noise, picked


def constants_of(gm: fx.GraphModule) -> tuple[Constants, dict[str, fx.Node]]:
    constants = Constants(gm)
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output"):
            constants.admit(node)
    return constants, {node.name: node for node in gm.graph.nodes}


def test_values_shapes_and_dtypes_of_constants() -> None:
    module = Computes()
    constants, nodes = constants_of(trace(module))
    weight = nodes["contiguous"]
    assert weight in constants.nodes
    assert constants.shape(weight) == (3, 5)
    assert constants.dtype(weight) == torch.float32
    exact = (module.a @ module.b.float()).T
    torch.testing.assert_close(constants.value(weight), exact)
    assert constants.dtype(nodes["b"]) == torch.float16
    assert constants.value(nodes["b"]).dtype == torch.float32


def test_what_reads_an_input_or_chance_is_no_constant() -> None:
    constants, nodes = constants_of(trace(Computes()))
    assert nodes["matmul_1"] not in constants.nodes
    assert not any(n in constants.nodes for name, n in nodes.items() if name.startswith("rand"))


def test_a_shape_that_hangs_on_values_is_unknown() -> None:
    constants, nodes = constants_of(trace(Computes()))
    picked = next(n for name, n in reversed(nodes.items()) if name.startswith("getitem"))
    assert constants.shape(picked) is None
    assert constants.value(picked).shape[1] == 2


def test_asking_for_a_shape_reads_no_weight() -> None:
    gm = trace(Computes())
    constants, nodes = constants_of(gm)
    value = nn.Parameter(torch.empty(5, 2, device="meta"))  # reading a value here would fail
    assign(gm, "a", value)
    assert constants.shape(nodes["contiguous"]) == (3, 5)


def test_a_constant_outlives_its_graph() -> None:
    """Folded weights are computed when read: what they are made of is swept by then."""
    module = Computes().requires_grad_(False)
    gm = trace(module)
    constants, nodes = constants_of(gm)
    weight = nodes["contiguous"]
    weight.replace_all_uses_with(nodes["a"])
    gm.graph.erase_node(weight)
    torch.testing.assert_close(constants.value(weight), (module.a @ module.b.float()).T)


def test_what_doubles_at_each_step_is_long() -> None:
    class Doubling(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.w, self.count = nn.Parameter(torch.randn(3, 3)), count

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = self.w
            for _ in range(self.count):
                whole = whole - whole @ self.w / 9
            return x @ whole

    for count, is_long in ((3, False), (40, True)):
        x = torch.randn(2, 3)
        gm = trace(Doubling(count).eval(), (x,))
        constants, nodes = constants_of(gm)
        known = [node for node in nodes.values() if node in constants.nodes]
        assert any(constants.is_long(node) for node in known) == is_long
        assert relative(fold(gm)(x), gm(x)) <= 1e-6
        assert relative(1.1 * gm(x), gm(x)) > 1e-2
