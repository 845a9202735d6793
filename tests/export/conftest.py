from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.adapter import Adapter, Update
from lora_fx.export import ExportReport, to_onnx
from lora_fx.passes import FoldLora, InjectLora
from lora_fx.sites import by_path
from lora_fx.trace import example_of, trace

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)
        self.tail = nn.Sequential(nn.ReLU(), nn.Linear(5, 4, bias=False))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.up(x)
        return {"hidden": hidden, "score": self.tail(hidden)}


@dataclass(frozen=True)
class Sample:
    """A traced model, its inputs at another shape than the traced one, and its adapters."""

    name: str
    gm: fx.GraphModule
    other: dict[str, torch.Tensor]
    dims: tuple[str, ...]

    def adapter(self, rank: int, seed: int = 0) -> Adapter:
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
        gm = self.gm if adapter is None else InjectLora(adapter)(self.gm).graph_module
        with torch.no_grad():
            return pytree.tree_leaves(gm(**(inputs or self.other)))


def _ragged() -> Made:
    return Ragged(), {"x": torch.randn(2, 7, 3)}, {"x": torch.randn(4, 5, 3)}


def _text(model: nn.Module) -> Made:
    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids, mask = torch.randint(0, 97, (batch, length)), torch.ones(batch, length)
        mask[1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask.long()}

    return model, inputs(2, 7), inputs(4, 11)


@pytest.fixture(scope="session", params=["mlp", "bert", "gpt2"])
def sample(request: pytest.FixtureRequest, tiny: Callable[..., nn.Module]) -> Sample:
    if request.param == "mlp":
        return _sample("mlp", _ragged)
    architecture = {"bert": "BertModel", "gpt2": "GPT2LMHeadModel"}[request.param]
    return _sample(request.param, lambda: _text(tiny(architecture)))


@pytest.fixture(scope="session")
def mlp() -> Sample:
    return _sample("mlp", _ragged)


@pytest.fixture
def twin() -> fx.GraphModule:
    """The shapes of `mlp` with other weights."""
    torch.manual_seed(1)
    return trace(Ragged().eval(), (torch.randn(4, 7, 3),))


def _sample(name: str, make: Callable[[], Made]) -> Sample:
    torch.manual_seed(0)
    model, traced, other = make()
    dims = ("batch", "length")
    shapes = {key: dict(enumerate(dims)) for key in traced}
    return Sample(name, trace(model.eval(), (), traced, dynamic_shapes=shapes), other, dims)


@dataclass
class Exported:
    """A sample's files, made once: ``constant``, ``folded`` and ``input``."""

    sample: Sample
    directory: Path
    reports: dict[str, ExportReport] = field(default_factory=dict)

    def path(self, form: str) -> Path:
        if form not in self.reports:
            gm = InjectLora(self.sample.adapter(2))(self.sample.gm).graph_module
            if form == "folded":
                gm = FoldLora()(gm).graph_module
            mode = "input" if form == "input" else "constant"
            self.reports[form] = to_onnx(gm, self.directory / f"{form}.onnx", adapters=mode)
        return self.directory / f"{form}.onnx"


@pytest.fixture(scope="session")
def exported(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(sample, tmp_path_factory.mktemp(sample.name))


@pytest.fixture(scope="session")
def exported_mlp(mlp: Sample, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(mlp, tmp_path_factory.mktemp("only_mlp"))


@pytest.fixture
def traced() -> Callable[..., fx.GraphModule]:
    def make(module: nn.Module, *args: Any, dynamic_shapes: Any = None) -> fx.GraphModule:
        return trace(module.eval(), args, dynamic_shapes=dynamic_shapes)

    return make
