"""A model of a directory that many tests export: traced once for all that find it as it was."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.tasks.model_source import ModelSource


def contents(source: ModelSource) -> str:
    """A digest of all that a trace depends on: classes, options, numbers, and the call."""
    model = source.model
    assert isinstance(model, nn.Module)
    own = {name: value for name, value in vars(model).items() if name[0] != "_"}
    configs = [getattr(module, "config", None) for module in model.modules()]
    leaves, spec = pytree.tree_flatten((source.args, dict(source.kwargs)))
    call = spec, source.dynamic_shapes, source.task, source.input_names, source.generates
    found = hashlib.sha256(repr((model, own, configs, call)).encode())
    held = itertools.chain(model.named_parameters(), model.named_buffers(), enumerate(leaves))
    for name, value in held:
        is_stored = isinstance(value, torch.Tensor) and not value.is_meta
        found.update(repr((name, value.dtype, value.shape) if is_stored else value).encode())
        if is_stored:
            found.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """A source whose model, numbers and call another had has its graph, which is only read."""
    graphs: dict[str, fx.GraphModule] = {}
    trace = ModelSource.traced

    def traced(source: Any) -> fx.GraphModule:
        key = contents(source)
        if key not in graphs:
            graphs[key] = trace(source)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSource, "traced", traced)
        yield
