"""Files as torch.onnx writes them, what they give with an adapter, and what eager does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter
from lora_fx.adapters.adapter import AnyUpdate
from lora_fx.export import Session, add_lora, export_adapter
from lora_fx.export.onnx_model.idle_work import without_idle_work


def _torch_file(model: nn.Module, x: torch.Tensor, path: Path, dynamo: bool = False) -> Path:
    """A file as torch.onnx writes it."""
    with warnings.catch_warnings(), without_idle_work():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (x,), str(path), dynamo=dynamo, verbose=False, external_data=False,
            input_names=["x"], output_names=["y"],
        )  # fmt: skip
    return path


def _with_adapter(
    base: Path, adapter: Adapter, x: torch.Tensor, directory: Path, **options: Any
) -> Any:
    """What a base gives after slots, without an adapter and with one."""
    out, file = directory / "slots.onnx", directory / "a.onnx_adapter"
    report = add_lora(base, out, **options)
    assert report.verified
    export_adapter(adapter, out, file)
    session = Session(out)
    return session.run({"x": x})["y"], session.run({"x": x}, file)["y"]


def _eager(model: nn.Module, adapter: Adapter, x: torch.Tensor) -> Any:
    """The model with W' in place of W, and as it is."""
    updates: Mapping[str, AnyUpdate] = adapter.updates
    with torch.no_grad():
        base = model(x)
        for path, update in updates.items():
            layer: Any = model.get_submodule(path)
            is_table = isinstance(layer, nn.Embedding)
            own = layer.weight.T if is_table else layer.weight
            made = update.weight(own)
            layer.weight.copy_(made.T if is_table else made)
        return base, model(x)


@pytest.fixture(scope="session")
def torch_file() -> Callable[..., Path]:
    return _torch_file


@pytest.fixture(scope="session")
def with_adapter() -> Callable[..., Any]:
    return _with_adapter


@pytest.fixture(scope="session")
def eager() -> Callable[..., Any]:
    return _eager
