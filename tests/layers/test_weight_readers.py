from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import AdapterError, trace
from lora_fx.layers.sites import by_path
from lora_fx.layers.weight_readers import check_reached
from lora_fx.testing import Computes

FINE: dict[str, Any] = {
    "all parts": lambda x, w: F.linear(x, w[:3]) + F.linear(x, w[3:]),
    "a part that nobody reads": lambda x, w: F.linear(x, w[:3]),
    "its sizes": lambda x, w: F.linear(x, w[: w.shape[0] // 2]),
    "the whole, read elsewhere": lambda x, w: F.linear(x, w) + w.sum(),
}
MISSED: dict[str, Any] = {
    "scaled": lambda x, w: F.linear(x, w[:3]) + F.linear(x, w[3:] * 2),
    "summed": lambda x, w: F.linear(x, w[:3]) + w.sum(),
    "of a chunk": lambda x, w: F.linear(x, w.chunk(2)[0]) + F.linear(x, w.chunk(2)[1].tanh()),
}


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", [*FINE, *MISSED])
def test_a_part_that_is_read_by_no_layer_is_told(name: str, frontend: str) -> None:
    run = (FINE | MISSED)[name]
    fc = nn.Linear(5, 6, bias=False)
    model = Computes(lambda m, x: run(x, m.fc.weight), fc=fc).eval()
    gm = trace(model, (torch.randn(3, 5),), frontend=frontend)
    if name in FINE:
        check_reached(gm, "fc", by_path(gm))
        return
    with pytest.raises(AdapterError, match=r"^parts of its weight fc\.weight"):
        check_reached(gm, "fc", by_path(gm))
