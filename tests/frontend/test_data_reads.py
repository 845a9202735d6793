"""Reads of ``tensor.data``, ``len(tensor)``, ``int(...)`` and repeats in a model's own code."""

from __future__ import annotations

import builtins

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import TraceError, trace
from lora_fx.frontend.data_reads import data_detached, lengths_free


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.fc.weight.data * 2, self.fc.bias)


def test_a_model_that_reads_data_is_traced_to_its_own_weight() -> None:
    model = Reads().eval()
    gm = trace(model, (torch.randn(4, 3),))
    assert any(node.target == "fc.weight" for node in gm.graph.nodes)
    model.fc.weight.data.add_(1)
    x = torch.randn(6, 3)
    with torch.no_grad():
        assert torch.equal(trace(model, (x,))(x), model(x))


def test_what_is_set_is_set_and_all_is_as_before() -> None:
    tensor = torch.ones(3)
    own = tensor.data
    with data_detached():
        tensor.data = torch.zeros(3)
        assert tensor.data.data_ptr() == tensor.data_ptr()
    assert tensor.sum() == 0
    assert own.sum() == 3
    assert "data" not in vars(torch.Tensor)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        assert len([x, x]) == 2
        return self.fc(x) * torch.arange(rows)[:, None]


def test_a_size_that_a_model_asks_len_for_stays_free() -> None:
    model = Counts().eval()
    gm = trace(model, (torch.randn(4, 3),), dynamic_shapes=({0: "batch"},))
    x = torch.randn(7, 3)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))


def test_len_is_python_s_own_again() -> None:
    with lengths_free(Counts()):
        assert len is not builtins.len
        with pytest.raises(TypeError, match="0-d tensor"):
            len(torch.tensor(1))
    assert len is builtins.len
    assert "len" not in globals()


class Padded(nn.Module):
    """As EnCodec: paddings are computed from a size and from numbers in buffers."""

    def __init__(self, counts_calls: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.stride = nn.Buffer(torch.tensor(4))
        self.counts_calls = counts_calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        short = torch.ceil(x.shape[1] / self.stride).to(torch.int64) * self.stride - x.shape[1]
        if self.counts_calls:
            self.stride.add_(1)
        return F.pad(self.fc(x), (0, 0, 0, short)) if short > 0 else self.fc(x)


def test_a_size_that_is_computed_from_numbers_in_buffers_is_known() -> None:
    model, x = Padded(counts_calls=False).eval(), torch.randn(6, 7, 3)
    gm = trace(model, (torch.randn(4, 7, 3),), dynamic_shapes=({0: "batch"},))
    assert gm(x).shape == (6, 8, 5)
    assert torch.equal(gm(x), model(x))
    assert type(model) is Padded
    assert "stride" in model._buffers
    one = x[:, :1]
    with pytest.raises((RuntimeError, AssertionError)):
        gm(one)


def test_a_number_that_a_call_changes_is_no_constant() -> None:
    model = Padded(counts_calls=True).eval()
    with pytest.raises(TraceError, match="data-dependent"):
        trace(model, (torch.randn(4, 7, 3),), check=False)
    assert model.stride == 4


class Halved(nn.Module):
    """As a Conformer: its mask is as long as the longest; and a part of a size is an int."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert isinstance(x.ndim, int)
        assert {int: True}[type(x.ndim)]
        longest, half = int(lengths.max()), int(x.shape[1] / 2)
        hidden = torch.arange(longest)[None] >= lengths[:, None]
        y = self.fc(x).masked_fill(hidden[..., None], 0.0) / float(x.shape[1])
        return y[:, :half]


def test_a_number_that_a_model_makes_an_int_of_stays_free() -> None:
    model = Halved().eval()
    first = torch.randn(2, 7, 3), torch.tensor([7, 4])
    gm = trace(model, first, dynamic_shapes=({0: "batch", 1: "length"}, {0: "batch"}))
    for x, lengths in (first, (torch.randn(3, 12, 3), torch.tensor([5, 12, 1]))):
        with torch.no_grad():
            assert torch.equal(gm(x, lengths), model(x, lengths))
    assert int is builtins.int
    assert float is builtins.float
    assert not {"int", "float"} & set(globals())


class Repeated(nn.Module):
    """As Chroma: a number for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([[2.0, 3.0]] * len(x))
        y: torch.Tensor = self.fc(x) * torch.tensor([4] * x.shape[0])[:, None] + rows[:, 1:]
        return y


def test_a_list_that_is_repeated_for_each_row_leaves_the_size_free() -> None:
    model, make = Repeated().eval(), torch.tensor
    gm = trace(model, (torch.randn(2, 3),), dynamic_shapes=({0: "batch"},))
    with torch.no_grad():
        for rows in (1, 7):
            x = torch.randn(rows, 3)
            assert torch.equal(gm(x), model(x))
            assert not torch.equal(gm(x), model.fc(x))
    assert torch.tensor is make


class Flagged(nn.Module):
    """As vector-quantize-pytorch: whether a codebook was made yet is told by a buffer."""

    def __init__(self, flag: torch.Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.register_buffer("made", flag)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(x) if self.made else self.fc(x) * 0
        return made


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor([1.0]), torch.tensor([[1]])])
def test_a_flag_in_a_buffer_is_known(flag: torch.Tensor) -> None:
    x = torch.randn(7, 3)
    for model in (Flagged(flag).eval(), Flagged(flag * 0).eval()):
        gm = trace(model, (x[:4],), dynamic_shapes=({0: "batch"},))
        with torch.no_grad():
            assert torch.equal(gm(x), model(x))
            assert bool(gm(x).any()) == bool(model.made)
