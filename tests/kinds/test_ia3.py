import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx import AdapterError
from lora_fx.kinds import ia3
from lora_fx.testing import by_peft, means, read_kind


@pytest.mark.parametrize("kernel", [(), (2,), (3, 2)])
def test_scales_outputs_or_inputs(kernel, noise, dtype):
    ones = [1] * len(kernel)
    base = noise(5, 3, *kernel)
    rows, columns = noise(5, dtype=dtype), noise(3, dtype=dtype)
    stored = rows.reshape(1, 5, *ones) if kernel else rows.reshape(5, 1)
    by_rows = torch.einsum("o,oi...->oi...", rows.float(), base)
    by_columns = torch.einsum("i,oi...->oi...", columns.float(), base)
    settings = {"shape": (5, 3, *kernel)}
    means(
        read_kind("ia3", {"ia3_l": stored}, feedforward=False, **settings),
        base,
        by_rows,
        by_columns,
    )
    stored = columns.reshape(1, 3, *ones)
    means(
        read_kind("ia3", {"ia3_l": stored}, feedforward=True, **settings), base, by_columns, by_rows
    )


@pytest.mark.parametrize("on_input", [0, 1])
@pytest.mark.parametrize("ones", [(), (1, 1)])
def test_scales_as_lycoris_stores_it(ones, on_input, noise):
    size = (5, 3)[on_input]
    base, factors = noise(5, 3, *((2, 2) if ones else ())), noise(size)
    stored = factors.reshape(1, size, *ones) if ones else factors
    tensors = {"weight": stored, "on_input": torch.tensor(on_input)}
    update = ia3.read(tensors, {"shape": tuple(base.shape)})
    rows = torch.einsum("i,oi...->oi..." if on_input else "o,oi...->oi...", 1 + factors, base)
    means(update, base, rows, base)


LAYERS = {
    "linear": lambda: nn.Linear(3, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "conv3d": lambda: nn.Conv3d(4, 6, (1, 2, 3)),
    "transposed": lambda: Conv1D(5, 3),
}


@pytest.mark.parametrize("is_input", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_peft_means(layer, is_input):
    made = LAYERS[layer]()
    config = peft.IA3Config(
        target_modules=["layer"],
        feedforward_modules=["layer"] if is_input else [],
        fan_in_fan_out=layer == "transposed",
    )
    foreign = by_peft(made, config)
    update = read_kind("ia3", foreign.tensors, feedforward=is_input)
    base, merged = foreign.base, foreign.merged
    if layer == "transposed":
        base, merged = base.T, merged.T
    means(update, base, merged, base * 1.1)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((5, 1), {"feedforward": True}, r"ia3_l is \(5, 1\) and feedforward is true"),
        ((1, 3), {"feedforward": False}, r"ia3_l is \(1, 3\) and feedforward is false"),
        ((5, 3), {"feedforward": False}, "ia3_l"),
        ((5, 1, 1, 1), {"feedforward": False}, "ia3_l"),
        ((1, 5, 2, 1), {"feedforward": False}, "ia3_l"),
        ((5,), {"feedforward": False}, "ia3_l"),
        ((5, 1), {}, "feedforward is None, expected true or false"),
        ((5, 1), {"feedforward": 1}, "feedforward is 1"),
        ((5, 1), {"feedforward": False, "shape": (6, 3)}, r"5 factors, the layer is \(6, 3\)"),
        ((1, 3), {"feedforward": True, "shape": (3, 6)}, r"3 factors, the layer is \(3, 6\)"),
        ((1, 6), {"feedforward": True, "shape": (5, 3)}, r"6 factors, the layer is \(5, 3\)"),
    ],
)
def test_refuses(shape, settings, message, noise):
    with pytest.raises(AdapterError, match=message):
        ia3.read({"ia3_l": noise(*shape)}, settings)
