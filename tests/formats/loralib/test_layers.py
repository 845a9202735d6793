"""loralib's fused layers as one pair, loralib being the oracle, and convolutions as points."""

from __future__ import annotations

from typing import Any

import loralib
import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.hints import Hints
from lora_fx.formats.loralib.layers import as_points, block_diagonal, groups_of

ENABLED = [
    [True],
    [True, False],
    [False, True],
    [True, True],
    [True, False, True],
    [False, True, False],
    [True, True, True],
    [False, True, False, True, True],
]


def fused(enabled: list[bool], rank: int = 2, **options: Any) -> Any:
    """loralib's layer, 3 -> 5 a group, as if trained."""
    layer = loralib.MergedLinear(
        3, 5 * len(enabled), r=rank, lora_alpha=3, enable_lora=enabled, **options
    )
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_the_pair_makes_the_delta_of_loralib(enabled: list[bool], rank: int, turned: bool) -> None:
    layer = fused(enabled, rank, fan_in_fan_out=turned)
    down, up = layer.lora_A.detach(), layer.lora_B.detach()
    whole = block_diagonal(up, tuple(enabled))
    assert whole.shape == (5 * len(enabled), rank * sum(enabled))
    expected = layer.merge_AB().detach()
    expected = expected.T if turned else expected
    torch.testing.assert_close(whole @ down, expected, rtol=1e-6, atol=1e-6)
    assert int(whole.count_nonzero()) == up.numel()
    if 0 < sum(enabled) < len(enabled):
        other = block_diagonal(up, tuple(enabled[::-1] if enabled != enabled[::-1] else enabled))
        assert torch.equal(other, whole) == (enabled == enabled[::-1])


def groups(enabled: list[bool], hint: Any, base: int | None = None) -> Any:
    layer = fused(enabled)
    return groups_of("a.qkv", layer.lora_A, layer.lora_B, Hints(enable_lora=hint), base)


@pytest.mark.parametrize("enabled", [e for e in ENABLED if sum(e) > 1], ids=str)
def test_a_list_is_of_every_fused_layer(enabled: list[bool]) -> None:
    assert groups(enabled, enabled) == tuple(enabled)
    assert groups(enabled, {"qkv": enabled}) == tuple(enabled)
    assert groups(enabled, enabled, base=5 * len(enabled)) == tuple(enabled)


def test_a_layer_of_one_output_is_not_fused() -> None:
    assert groups([True], None) is None
    assert groups([True], [True, False, True]) is None
    assert groups([True], {"other": [True, False]}) is None
    assert groups([True], [True, False], base=5) is None


def test_one_adapted_output_is_told_by_the_base_or_by_name() -> None:
    assert groups([False, True], [False, True], base=10) == (False, True)
    assert groups([False, True], {"qkv": [False, True]}) == (False, True)


@pytest.mark.parametrize(
    ("enabled", "hint", "base", "message"),
    [
        ([False, True], [False, True], None, r"a\.qkv may be fused or not; pass base="),
        ([True, False, True], None, None, "fused layer .* with 2 adapted outputs; pass"),
        ([True, True], [True, True, True], None, "2 outputs are adapted, .* says 3"),
        ([True, True, True], {"qkv": [True, False, True]}, None, "3 outputs .* says 2"),
        ([True, True], [True, True], 15, "an output of 10, the base's is of 15"),
        ([False, True], None, 10, "no enable_lora of an output of 5, the base's is of 10"),
        ([True, True], [False, False], None, "expected a list of bools, one True"),
        ([True, True], [1, 1], None, "expected a list of bools"),
        ([True, True], {"qkv": "TT"}, None, "expected a list of bools"),
        ([True, True], True, None, "expected a list of bools"),
    ],
)
def test_a_hint_that_does_not_fit_is_refused(
    enabled: list[bool], hint: Any, base: int | None, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        groups(enabled, hint, base)


@pytest.mark.parametrize(("down", "up"), [((3, 4), (5, 2)), ((1, 4), (5, 2)), ((4, 3), (5, 2))])
def test_ranks_that_differ_are_refused(down: Any, up: Any) -> None:
    hints = Hints(enable_lora=[True, True])
    with pytest.raises(AdapterError, match="the ranks differ"):
        groups_of("fc", torch.ones(down), torch.ones(up), hints, None)


def test_what_a_point_says_is_said_of_every_row() -> None:
    up = torch.arange(6.0).reshape(3, 2)
    whole = as_points(up, 2)
    assert whole.shape == (6, 4)
    assert torch.equal(whole[::2, ::2], up)
    assert not whole[::2, 1::2].any()
