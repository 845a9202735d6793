"""A wrapper around a model (``self.m = model``) does not break an adapter of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.testing import make_adapter


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(torch.tanh(self.norm(self.one(x))))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, x: torch.Tensor) -> Any:
        return 2 * self.m(x)


class Both(nn.Module):
    def __init__(self, query: nn.Module, key: nn.Module) -> None:
        super().__init__()
        self.query, self.key = query, key

    def forward(self, x: torch.Tensor) -> Any:
        return self.query(x) - self.key(x)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def french(tmp_path: Path) -> Path:
    trained = make_adapter({"one": (5, 3), "two": (4, 5)})
    torch.manual_seed(2)
    whole = Adapter("french", trained.updates, {"norm.weight": torch.randn(5)})
    lora_fx.save_adapter(whole, tmp_path / "french")
    return tmp_path / "french"


@pytest.fixture
def inner() -> nn.Module:
    torch.manual_seed(0)
    return Inner().eval()


def adapted(model: nn.Module, x: torch.Tensor, adapter: Adapter) -> Any:
    return lora_fx.inject(lora_fx.trace(model, (x,)), adapter)(x)


def test_a_prefix_says_where_and_a_base_finds_it(
    french: Path, inner: nn.Module, x: torch.Tensor
) -> None:
    expected = 2 * adapted(inner, x, lora_fx.load_adapter(french))
    wrapped = Wrapper(inner)
    told = lora_fx.load_adapter(french, prefix="m")
    found = lora_fx.load_adapter(french, base=wrapped)
    assert {*told.updates, *told.replacements} == {"m.one", "m.two", "m.norm.weight"}
    assert told.updates.keys() == found.updates.keys()
    assert told.moves == found.moves == ["paths moved: (root) -> m"]
    for adapter in (told, found, lora_fx.load_adapter(french)):
        assert lora_fx.compare(adapted(wrapped, x, adapter), expected).ok
    assert not lora_fx.compare(wrapped(x), expected).ok


def test_of_two_models_the_prefix_alone_tells(
    french: Path, inner: nn.Module, x: torch.Tensor
) -> None:
    model = Both(inner, Inner().eval())
    with pytest.raises(AdapterError, match=r"mean several layers .*; pass prefix= to load_adapter"):
        lora_fx.load_adapter(french, base=model)
    for options in ({"prefix": "query"}, {"prefix": "query", "base": model}):
        adapter = lora_fx.load_adapter(french, **options)
        expected = adapted(inner, x, lora_fx.load_adapter(french)) - model.key(x)
        assert lora_fx.compare(adapted(model, x, adapter), expected).ok
    other = lora_fx.load_adapter(french, prefix="key")
    assert not lora_fx.compare(adapted(model, x, other), expected).ok


def test_a_swappable_file_of_two_takes_it(
    french: Path, inner: nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    file, out = tmp_path / "both.onnx", tmp_path / "french.onnx_adapter"
    model = Both(inner, Inner().eval())
    gm = lora_fx.trace(model, (x,))
    lora_fx.to_onnx(
        gm, file, adapters="input", slots=["all-linear", "query.norm.weight", "key.norm.weight"]
    )
    with pytest.raises(AdapterError, match="mean several layers"):
        lora_fx.export_adapter(french, file, out)
    adapter = lora_fx.load_adapter(french, prefix="query")
    report = lora_fx.export_adapter(adapter, file, out)
    assert [slot.path for slot in report.filled] == ["query.one", "query.two", "query.norm.weight"]
    assert [slot.rank for slot in report.filled] == [2, 2, None]
    assert list(report.left) == ["key.one", "key.two", "key.norm.weight"]
    (found,) = lora_fx.Session(file).run({"x": x}, adapter=out).values()
    assert lora_fx.compare(found, adapted(model, x, adapter)).ok
    assert not lora_fx.compare(found, model(x)).ok


@pytest.mark.parametrize("prefix", ["", ".", "m.", "m..one", "a b", "m/one"])
def test_what_is_no_path_is_refused(prefix: str, french: Path) -> None:
    with pytest.raises(AdapterError, match=r"french: prefix .*: expected the path of a module"):
        lora_fx.load_adapter(french, prefix=prefix)


def test_a_prefix_of_no_module_is_told_with_those_that_there_are(
    french: Path, inner: nn.Module, x: torch.Tensor
) -> None:
    with pytest.raises(AdapterError, match=r"match nothing in the graph: q\.one"):
        adapted(Wrapper(inner), x, lora_fx.load_adapter(french, prefix="q"))


def test_a_format_that_needs_the_base_finds_it_there(
    french: Path, inner: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / "kohya.safetensors"
    plain = make_adapter({"one": (5, 3), "two": (4, 5)})
    lora_fx.save_adapter(plain, file, format="kohya", component="unet")
    with pytest.raises(AdapterError, match="leave prefix out"):
        lora_fx.load_adapter(file, base=inner, prefix="m")
