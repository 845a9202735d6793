"""loralib's fused layers as one pair, loralib being the oracle, and convolutions as points."""

from __future__ import annotations

import loralib
import pytest
import torch

from lora_fx.kinds.loralib import as_points, block_diagonal

ENABLED = [[True], [True, False], [False, True], [True, True], [True, False, True],
           [False, True, False], [True, True, True], [False, True, False, True, True]]  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_the_pair_makes_the_delta_of_loralib(enabled: list[bool], rank: int, turned: bool) -> None:
    options = {"r": rank, "lora_alpha": 3, "enable_lora": enabled, "fan_in_fan_out": turned}
    layer = loralib.MergedLinear(3, 5 * len(enabled), **options)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
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


def test_what_a_point_says_is_said_of_every_row() -> None:
    up = torch.arange(6.0).reshape(3, 2)
    whole = as_points(up, 2)
    assert whole.shape == (6, 4)
    assert torch.equal(whole[::2, ::2], up)
    assert not whole[::2, 1::2].any()
