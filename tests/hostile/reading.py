"""What is done with each case, and what a corpus without blobs says of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from making import Net

import lora_fx
from lora_fx.cli import main
from lora_fx.cli.inspect import describe

X = {"x": np.ones((2, 3), np.float32)}
_graphs: dict[torch.dtype, Any] = {}


def graph(dtype: torch.dtype = torch.float32) -> Any:
    """The model that adapters are for, traced once."""
    if dtype not in _graphs:
        torch.manual_seed(0)
        _graphs[dtype] = lora_fx.trace(Net().to(dtype).eval(), (torch.randn(2, 3, dtype=dtype),))
    return _graphs[dtype]


def load(home: Path) -> None:
    lora_fx.load_adapter(home)


def load_pickle(home: Path) -> None:
    lora_fx.load_adapter(home, allow_pickle=True)


def fit(home: Path) -> None:
    """Reads an adapter and puts it into the model."""
    lora_fx.inject(graph(), lora_fx.load_adapter(home))


def export(home: Path, dtype: torch.dtype = torch.float32) -> None:
    """Merges it, and writes that."""
    gm = lora_fx.fold(lora_fx.inject(graph(dtype), lora_fx.load_adapter(home)))
    lora_fx.to_onnx(gm, home / "merged.onnx")


def export_half(home: Path) -> None:
    export(home, torch.float16)


def twice(home: Path) -> None:
    """Two adapters of one name in one graph."""
    one = lora_fx.load_adapter(home, name="a")
    lora_fx.inject(lora_fx.inject(graph(), one), one)


def session(home: Path) -> None:
    lora_fx.Session(home / "model.onnx").run(X)


def run(home: Path) -> None:
    """The model with the adapter file beside it."""
    lora_fx.Session(home / "model.onnx").run(X, adapter=home / "a.onnx_adapter")


def index(home: Path) -> None:
    """An index of an adapter, as models that stack theirs take one."""
    lora_fx.Session(home / "model.onnx").run({**X, "adapter_ids": np.array([-1])})


def inspect(home: Path) -> None:
    describe(home / "a.onnx_adapter")


def directory(home: Path) -> None:
    """A directory of transformers as a model."""
    lora_fx.tasks.load(home)


def command(home: Path) -> None:
    """Runs what the case's own file says, in its directory."""
    words = (home / "command.txt").read_text().split("\n")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([word.replace("HOME", str(home)) for word in words])
        except SystemExit as stop:
            if stop.code == 2:
                text = said.getvalue()
                assert text.startswith("error: "), text
                assert text.count("\n") == 1, text
                raise lora_fx.LoraFxError(text) from stop


WAYS: dict[str, Callable[[Path], None]] = {
    way.__name__: way
    for way in (
        load, load_pickle, fit, export, export_half, twice, session, run, index, inspect,
        directory, command,
    )
}  # fmt: skip
