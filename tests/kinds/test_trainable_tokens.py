import peft
import pytest
import torch
from torch import nn

from lora_fx import AdapterError
from lora_fx.algebra.evaluate import recorded
from lora_fx.kinds import trainable_tokens as tokens
from lora_fx.testing import by_peft, means, read_kind

DELTA = "trainable_tokens_delta"


@pytest.mark.parametrize("settings", [{}, {"shape": (3, 11)}])
def test_rows_of_the_table_are_replaced(settings, noise, dtype):
    rows, base = noise(2, 3, dtype=dtype), noise(3, 11)
    update = read_kind("tokens", {DELTA: rows}, indices=[7, 2], **settings)
    expected, swapped = base.clone(), base.clone()
    expected[:, 7], expected[:, 2] = rows.float()
    swapped[:, 2], swapped[:, 7] = rows.float()
    means(update, base, expected, swapped, within=0)
    assert update.shape == (3, 11 if settings else None)


def test_rows_of_a_head_are_replaced(noise):
    rows, base = noise(2, 3), noise(11, 3)
    update = read_kind("tokens", {DELTA: rows}, indices=[7, 2], head=True)
    expected = base.clone()
    expected[[7, 2]] = rows
    means(update, base, expected, within=0)
    assert update.shape == (None, 3)


def test_means_what_peft_means():
    config = peft.TrainableTokensConfig(target_modules=["layer"], token_indices=[7, 2])
    foreign = by_peft(nn.Embedding(11, 3), config)
    update = read_kind("tokens", foreign.tensors, indices=[7, 2])
    means(update, foreign.base.T, foreign.merged.T, within=0)


@pytest.mark.filterwarnings("ignore")  # what torch.onnx says of itself is not what is tested
@pytest.mark.parametrize("is_head", [False, True])
def test_exports(is_head, noise, tmp_path):
    import onnxruntime

    update = read_kind("tokens", {DELTA: noise(2, 3)}, indices=[7, 2], head=is_head)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Parameter(noise(11, 3) if is_head else noise(3, 11))
            self.index, self.rows = map(nn.Buffer, update.values)

        def forward(self, x):
            made = recorded(update.of, tuple(self.base.shape), update.leaves)
            return x @ made(self.base, self.index, self.rows)

    model, x = Table().eval(), noise(4, 11 if is_head else 3)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, optimize=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (actual,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.tensor(actual), model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(torch.tensor(actual), x @ model.base, rtol=1e-2)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 3), {}, "indices is None, expected a list of integers"),
        ((2, 3), {"indices": [1, True]}, "indices is"),
        ((2, 3), {"indices": [1, 2, 3]}, "3 indices, 3 of them different, and 2 rows"),
        ((2, 3), {"indices": [1, 1]}, "2 indices, 1 of them different"),
        ((2, 3), {"indices": [1, -1]}, "token -1"),
        ((2, 3), {"indices": [1, 9], "shape": (3, 9)}, "token 9 .*below 9"),
        ((2, 3), {"indices": [1, 2], "shape": (4, 9)}, "has dim 3"),
        ((2, 3), {"indices": [1, 2], "shape": (3, 9), "head": True}, "has dim 3"),
        ((2, 3), {"indices": [1, 2], "head": "yes"}, "head is 'yes'"),
        ((2,), {"indices": [1, 2]}, DELTA),
    ],
)
def test_refuses(shape, settings, message, noise):
    with pytest.raises(AdapterError, match=message):
        tokens.read({DELTA: noise(*shape)}, settings)
