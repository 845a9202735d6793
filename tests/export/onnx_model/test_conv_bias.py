from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.testing import relative


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_without_a_bias_has_none_in_onnx(
    dims: int, bias: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layer = kind(4, 6, (3, 2, 1)[:dims], bias=bias).eval()
    x = torch.randn(2, 4, *(7, 8, 5)[:dims])
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(lora_fx.trace(layer, (x,)), path)
    (node,) = (n for n in onnx.load(path).graph.node if n.op_type == "Conv")
    assert len(node.input) == 2 + bias
    (outputs,) = lora_fx.Session(path).run({"input": x}).values()
    with torch.no_grad():
        assert relative(torch.from_numpy(outputs), layer(x)) <= 1e-5
        assert relative(torch.from_numpy(outputs), layer(x) + 0.1) > 1e-2
