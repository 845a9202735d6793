"""aLoRA beside a module: nothing before its last invocation, all of the update from there on."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx import Update
from lora_fx.adapters.updates import activated
from lora_fx.reference.activated import Activated


def test_it_is_added_from_the_last_invocation_on() -> None:
    plain = Update(torch.randn(2, 3), torch.randn(5, 2), 1.5, bias=torch.randn(5))
    ids = torch.tensor([[4, 2, 9, 4, 2, 7], [2, 4, 1, 2, 2, 2], [1, 1, 1, 1, 4, 2]])
    layer, x = nn.Linear(3, 5), torch.randn(3, 6, 3)
    own, shift = layer(x).detach(), plain.shift(lambda: None)
    assert shift is not None
    change = x @ plain.delta().T + shift
    wanted = own.clone()
    wanted[0, 3:] += change[0, 3:]
    wanted[2, 4:] += change[2, 4:]
    found = Activated("fc", activated(plain, [4, 2])).beside(ids)(layer, (x,), own)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, own, atol=1e-2)
