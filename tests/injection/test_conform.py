from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_fx import AdapterError, Update
from lora_fx.adapters.adapter import Scaling, WeightUpdate
from lora_fx.adapters.parameter_updates import for_parameter, of_parameter
from lora_fx.injection.conform import conform, conform_parameter
from lora_fx.layers.layer import Layer


def layer(kind: str, *shape: int, groups: int = 1) -> Layer:
    return Layer(path="fc", kind=kind, shape=shape, dtype=torch.float32, groups=groups)


LINEAR, TABLE = layer("linear", 5, 3), layer("embedding", 5, 11)
CONV, GROUPED = layer("conv2d", 6, 4, 3, 2), layer("conv2d", 6, 4, 3, 2, groups=2)


def identity(weight: Any) -> Any:
    return weight


@pytest.mark.parametrize(
    ("down", "up", "where", "shape"),
    [
        ((2, 3), (5, 2), LINEAR, (5, 3)),
        ((2, 3, 1, 1), (5, 2), LINEAR, (5, 3)),
        ((2, 24), (6, 2), CONV, (6, 4, 3, 2)),
        ((2, 4, 3, 2), (6, 2), CONV, (6, 4, 3, 2)),
        ((2, 4, 3, 2), (6, 1), GROUPED, (6, 4, 3, 2)),
    ],
)
def test_values_stay_where_the_shape_says_the_same(
    down: tuple[int, ...], up: tuple[int, ...], where: Layer, shape: tuple[int, ...]
) -> None:
    update = Update(torch.randn(down), torch.randn(up), 1.5)
    found = conform(update, where)
    assert isinstance(found, Update)
    assert found.shape == shape
    assert torch.equal(found.down.flatten(), update.down.flatten())


@pytest.mark.parametrize("down", [(2, 2, 3, 2), (2, 12)])
def test_a_weight_of_groups_is_made_anew(down: tuple[int, ...]) -> None:
    update = Update(torch.randn(down), torch.randn(6, 2), 1.5, bias=torch.randn(6))
    found = conform(update, GROUPED)
    assert isinstance(found, WeightUpdate)
    base = torch.randn(6, 2, 3, 2)
    wanted = base + 1.5 * (update.up @ update.down.flatten(1)).reshape(6, 2, 3, 2)
    torch.testing.assert_close(found.weight(base), wanted)
    assert found.bias is not None
    torch.testing.assert_close(found.bias, 1.5 * update.bias)
    assert not torch.allclose(found.weight(base), base, rtol=1e-2)


def test_vera_reads_the_first_columns_of_a_wider_projection() -> None:
    update = Update(torch.randn(2, 7), torch.randn(5, 2), 1.0, "vera")
    found = conform(update, LINEAR)
    assert isinstance(found, Update)
    assert torch.equal(found.down, update.down[:, :3])
    with pytest.raises(AdapterError, match="7 -> 5, the model's is 3 -> 5"):
        conform(Update(update.down, update.up, 1.0), LINEAR)


@pytest.mark.parametrize(
    ("kind", "turned"),
    [
        ("linear", False),
        ("linear_transposed", True),
        ("embedding", True),
        ("conv_transpose1d", False),
    ],
)
def test_the_update_of_a_parameter_is_turned_where_a_layer_stores_it_turned(
    kind: str, turned: bool
) -> None:
    """PEFT's ``target_parameters`` counts axes as they are stored."""
    down, up = torch.randn(2, 3), torch.randn(5, 2)
    as_stored = (up.T, down.T) if turned else (down, up)
    kernel = (1,) * kind.startswith("conv")
    given = of_parameter(Update(*as_stored, 1.5), "weight", transposed=False)
    where = layer(kind, 5, 3, *kernel)
    found = conform(given, where)
    again = conform(found, where)
    for each in (found, again):
        assert isinstance(each, Update)
        assert torch.equal(each.down.flatten(1), down)
        assert torch.equal(each.up, up)
    stored = for_parameter(again)  # type: ignore[arg-type]
    assert torch.equal(stored.down.flatten(1), given.down)
    assert torch.equal(stored.up, given.up)


REFUSED: list[tuple[Any, Layer, str]] = [
    (Update(torch.ones(2, 4), torch.ones(5, 2), 1.0), LINEAR, "4 -> 5, the model's is 3 -> 5"),
    (Update(torch.ones(2, 3), torch.ones(4, 2), 1.0), LINEAR, "3 -> 4, the model's is 3 -> 5"),
    (
        Update(torch.ones(2, 4, 2, 3), torch.ones(6, 2), 1.0),
        CONV,
        r"4 -> 6, kernel \(2, 3\), the model's is 4 -> 6, kernel \(3, 2\)",
    ),
    (
        Update(torch.ones(2, 4, 1, 3), torch.ones(6, 2), 1.0),
        layer("conv2d", 6, 4, 3, 1),
        r"kernel \(1, 3\), the model's is 4 -> 6, kernel \(3, 1\)",
    ),
    (
        Update(torch.ones(2, 4, 3, 2), torch.ones(6, 1), 1.0, magnitude=torch.ones(6)),
        GROUPED,
        "no weight to norm",
    ),
    (
        Update(torch.ones(2, 2, 3, 2), torch.ones(6, 2), 1.0, row=torch.ones(6)),
        GROUPED,
        "have no form",
    ),
    (Update(torch.ones(2, 11), torch.ones(5, 2), 1.0, col=torch.ones(11)), TABLE, "reads ids"),
    (Scaling(col=torch.ones(11)), TABLE, "reads ids"),
    (Scaling(row=torch.ones(4)), LINEAR, r"\? -> 4, the model's is 3 -> 5"),
    (WeightUpdate("full", identity, (3, 5)), LINEAR, "5 -> 3"),
    (WeightUpdate("oft", identity, (None, 23)), CONV, "23 -> "),
]


@pytest.mark.parametrize(("update", "where", "reason"), REFUSED)
def test_another_layer_is_refused_by_both_shapes(update: Any, where: Layer, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        conform(update, where)


def test_a_bias_beside_a_parameter_is_refused() -> None:
    weight = WeightUpdate("full", identity, (5, 3))
    assert conform_parameter(weight, (5, 3)) is weight
    with pytest.raises(AdapterError, match=r"a bias \(lora_bias, diff_b\) stands beside a layer"):
        conform_parameter(replace(weight, bias=torch.ones(5)), (5, 3))


@pytest.mark.parametrize("shape", [(6, 24), (None, 24), (6, None), (6, 4, 3, 2)])
def test_a_function_of_as_many_columns_fits(shape: Any) -> None:
    update = WeightUpdate("oft", identity, shape)
    assert conform(update, CONV) is update


def test_vectors_turn_with_the_update_of_a_parameter() -> None:
    update = Update(
        torch.randn(2, 3), torch.randn(5, 2), 1.5, row=torch.rand(5) + 1, col=torch.rand(3) + 1
    )
    own = torch.randn(3, 5)
    turned = conform_parameter(update, (3, 5))
    torch.testing.assert_close(turned.weight(own), update.weight(own.T).T)
