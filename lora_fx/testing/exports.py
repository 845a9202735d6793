"""Traced models, random adapters for them, and their ONNX files, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.api import fold, inject
from lora_fx.choices import AdapterMode
from lora_fx.frontend.trace import trace
from lora_fx.graph.example import example_of
from lora_fx.layers.sites import by_path
from lora_fx.testing.models import Outputs
from lora_fx.testing.zoo import tiny

if TYPE_CHECKING:
    from lora_fx.export import ExportReport

Inputs = dict[str, torch.Tensor]
_DIMS = "batch", "length"


@dataclass(frozen=True)
class Sample:
    """A traced model and its inputs at another shape than the traced one.

    Attributes:
        name: ``"mlp"``, ``"bert"`` or ``"gpt2"``.
        gm: its graph.
        other: inputs by name, of another batch and length.
        dims: the names of the axes that may change.
    """

    name: str
    gm: fx.GraphModule
    other: Inputs
    dims: tuple[str, ...] = _DIMS

    def adapter(self, rank: int, seed: int = 0) -> Adapter:
        """A random adapter for all linear layers but the head, another one for another seed."""
        source = torch.Generator().manual_seed(1000 * rank + seed)
        example = example_of(self.gm)
        assert example is not None
        updates = {}
        for path, (site, *_) in by_path(self.gm).items():
            if not site.is_linear:
                continue
            if path != example.output_embedding:
                down = torch.randn(rank, site.in_features, generator=source) / 4
                up = torch.randn(site.out_features, rank, generator=source) / 4
                updates[path] = Update(down, up, 2.0)
        return Adapter(f"rank{rank}", updates)

    def eager(self, adapter: Adapter | None = None, inputs: Any = None) -> list[torch.Tensor]:
        """The outputs, of ``other`` by default, with an adapter or without."""
        gm = self.gm if adapter is None else inject(self.gm, adapter)
        with torch.no_grad():
            return pytree.tree_leaves(gm(**(inputs or self.other)))


@dataclass
class Exported:
    """A sample's files, made once: ``constant``, ``folded`` and ``input``.

    Attributes:
        sample: the model.
        directory: of the files.
        reports: of the files that were made, by name.
    """

    sample: Sample
    directory: Path
    reports: dict[str, ExportReport] = field(default_factory=dict)

    def path(self, form: str) -> Path:
        """A file, exported and verified when it is first asked for."""
        from lora_fx.export import to_onnx

        if form not in self.reports:
            gm = inject(self.sample.gm, self.sample.adapter(2))
            if form == "folded":
                gm = fold(gm)
            mode: AdapterMode = "input" if form == "input" else "constant"
            self.reports[form] = to_onnx(gm, self.directory / f"{form}.onnx", adapters=mode)
        return self.directory / f"{form}.onnx"


def sample_of(name: str) -> Sample:
    """A sample: ``"mlp"`` or, of transformers, ``"bert"`` and ``"gpt2"``."""
    torch.manual_seed(0)
    model, inputs, other = _SAMPLES[name]()
    shapes = {key: dict(enumerate(_DIMS)) for key in inputs}
    return Sample(name, trace(model.eval(), (), inputs, dynamic_shapes=shapes), other)


def traced(module: nn.Module, *args: Any, dynamic_shapes: Any = None) -> fx.GraphModule:
    """The graph of a module in evaluation mode; without inputs by symbolic tracing."""
    return trace(module.eval(), args, dynamic_shapes=dynamic_shapes)


def _mlp() -> tuple[nn.Module, Inputs, Inputs]:
    return Outputs(), {"x": torch.randn(2, 7, 3)}, {"x": torch.randn(4, 5, 3)}


def _text(model: nn.Module) -> tuple[nn.Module, Inputs, Inputs]:
    def inputs(batch: int, length: int) -> Inputs:
        ids, mask = torch.randint(0, 97, (batch, length)), torch.ones(batch, length)
        mask[1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask.long()}

    return model, inputs(2, 7), inputs(4, 11)


_SAMPLES: dict[str, Callable[[], tuple[nn.Module, Inputs, Inputs]]] = {
    "mlp": _mlp,
    "bert": lambda: _text(tiny("BertModel")),
    "gpt2": lambda: _text(tiny("GPT2LMHeadModel")),
}
