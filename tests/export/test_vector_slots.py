"""One export with vector slots takes adapters of every kind that needs no new weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Adapter, AdapterError, ExportError, Update, inject, load_adapter, trace
from lora_fx.adapters.adapter import AnyUpdate, Scaling, WeightUpdate
from lora_fx.algebra.matrix_expr import number, scaled
from lora_fx.testing import relative


class Net(nn.Module):
    """A layer of each kind that a slot can stand beside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 8)
        self.flat = Conv1D(4, 8)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.table(ids)).transpose(1, 2)
        x = torch.tanh(self.conv(x)).transpose(1, 2)
        x = torch.tanh(self.flat(torch.tanh(self.fc(x))))
        y: torch.Tensor = self.attn(x, x, x, need_weights=False)[0]
        return y


SHAPES = {"table": (4, 11), "conv": (6, 4, 3), "fc": (8, 6), "flat": (4, 8), "attn": (12, 4)}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def low_rank(rank: int, **vectors: bool) -> Adapter:
    """An update of every layer, with the vectors asked for."""
    updates = {}
    for seed, (path, (out, into, *kernel)) in enumerate(SHAPES.items()):
        made = {
            "magnitude": random(seed, out).abs() + 0.5,
            "bias": random(seed + 9, out),
            "col": 1 + random(seed + 7, into),
        }
        chosen = {name: made[name] for name in vectors if path != "table" or name != "col"}
        down, up = random(seed + 1, rank, into, *kernel), random(seed + 2, out, rank)
        updates[path] = Update(down, up, 0.7, **chosen)  # type: ignore[arg-type]
    return Adapter("low_rank", updates)


def scalings() -> Adapter:
    updates: dict[str, AnyUpdate] = {
        path: Scaling(row=1 + random(seed, shape[0]))
        for seed, (path, shape) in enumerate(SHAPES.items())
    }
    return Adapter("ia3", updates | {"fc": Scaling(col=1 + random(3, 6))})


ADAPTERS = {
    "lora": lambda: low_rank(2),
    "lora_of_another_rank": lambda: low_rank(5),
    "dora": lambda: low_rank(3, magnitude=True),
    "lora_bias": lambda: low_rank(1, bias=True),
    "columns": lambda: low_rank(2, col=True),
    "ia3": scalings,
    "one_layer": lambda: Adapter("one", {"conv": low_rank(2).updates["conv"]}),
}


@pytest.fixture(scope="module", params=["inline", "external"])
def exported(request: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 7))
    gm = trace(Net().eval(), (ids,), dynamic_shapes=({0: "batch"},))
    path = tmp_path_factory.mktemp("vectors") / "model.onnx"
    limit = 0 if request.param == "external" else 1 << 30
    report = lora_fx.to_onnx(
        gm, path, adapters="input", slots=list(SHAPES), vectors=True, external_data_above=limit
    )
    assert report.slots == list(SHAPES)
    return gm, path


@pytest.mark.parametrize("kind", ADAPTERS)
def test_one_file_takes_every_kind(exported: tuple[Any, Path], kind: str, tmp_path: Path) -> None:
    gm, path = exported
    adapter, ids = ADAPTERS[kind](), torch.randint(0, 11, (3, 7))
    file = tmp_path / "a.onnx_adapter"
    lora_fx.export_adapter(adapter, path, file)
    session = lora_fx.Session(path, threads=1)
    (found,) = session.run({"ids": ids}, adapter=file).values()
    (alone,) = session.run({"ids": ids}).values()
    with torch.no_grad():
        wanted, base = inject(gm, adapter)(ids), gm(ids)
    assert relative(torch.from_numpy(found), wanted) <= 1e-5
    assert relative(torch.from_numpy(alone), base) <= 1e-5
    assert relative(base, wanted) > 1e-2
    again = load_adapter(file)
    assert again.updates.keys() == adapter.updates.keys()
    with torch.no_grad():
        assert relative(inject(gm, again)(ids), wanted) <= 1e-5


def test_dora_is_relative_to_the_base_that_the_file_holds(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    """Half of the weight doubles the row, which a baked vector would not know."""
    _, path = exported
    file, names = tmp_path / "a.onnx_adapter", {}
    for scale in (0.7, 0.0):
        adapter = low_rank(3, magnitude=True)
        import dataclasses

        updates = {k: dataclasses.replace(u, scale=scale) for k, u in adapter.updates.items()}  # type: ignore[type-var]
        lora_fx.export_adapter(Adapter("a", updates), path, file, force=True)
        names[scale] = load_adapter(file).updates["fc"].row  # type: ignore[union-attr]
    assert not torch.allclose(names[0.7], names[0.0], atol=1e-2)


def test_a_file_whose_weight_was_changed_since_is_refused(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    model = onnx.load(exported[1])
    path, file = tmp_path / "model.onnx", tmp_path / "a.onnx_adapter"
    for held in model.graph.initializer:
        if held.dims == [8, 6] or held.dims == [6, 8]:
            array = numpy_helper.to_array(held)
            held.CopyFrom(numpy_helper.from_array(2 * array, held.name))
    meant = next(p for p in model.metadata_props if p.key == "lora_fx.digests")
    model.metadata_props.remove(meant)  # as by a quantiser
    onnx.save(model, path)
    lora_fx.export_adapter(low_rank(2), path, file)  # no weight is asked for
    with pytest.raises(AdapterError, match=r"fc\.weight is not among the model's constants"):
        lora_fx.export_adapter(low_rank(2, magnitude=True), path, file, force=True)


def test_what_no_slot_carries_is_refused(exported: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = exported

    def doubled(weight: Any) -> Any:
        return scaled(number(2.0), weight)

    dense = Adapter("dense", {"fc": WeightUpdate("full", doubled, (8, 6))})
    with pytest.raises(AdapterError, match="fc: an update of kind 'full' makes the weight anew"):
        lora_fx.export_adapter(dense, path, tmp_path / "a.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


def test_vectors_need_the_right_export(tmp_path: Path) -> None:
    gm = trace(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)).eval(), (torch.randn(2, 4, 9),))
    with pytest.raises(ExportError, match='needs adapters="input"'):
        lora_fx.to_onnx(gm, tmp_path / "m.onnx", vectors=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", [nn.Linear(1, 3), nn.Conv1d(1, 3, 1), nn.Conv1d(1, 3, 2)])
def test_the_factor_of_a_layer_s_only_input_is_one_of_its_rows(
    layer: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(4, 1, 5) if isinstance(layer, nn.Conv1d) else torch.randn(4, 1)
    gm, path = trace(nn.Sequential(layer).eval(), (x,)), tmp_path / "model.onnx"
    lora_fx.to_onnx(gm, path, adapters="input", slots=["0"], vectors=True)
    updates: dict[str, AnyUpdate] = {"0": Scaling(col=torch.tensor([1.5]))}
    lora_fx.export_adapter(Adapter("ia3", updates), path, tmp_path / "a.onnx_adapter")
    session = lora_fx.Session(path)
    found = session.run({session.inputs[0]: x}, tmp_path / "a.onnx_adapter").values()
    (adapted,) = map(torch.from_numpy, found)
    with torch.no_grad():
        assert relative(adapted, layer(1.5 * x)) < 1e-5
        assert relative(adapted, layer(x)) > 1e-2


class Twice(nn.Linear):
    """Calls its weight with its bias, and then without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * F.linear(2 * x, self.weight)


def test_a_slot_of_a_layer_that_is_called_without_its_bias_too_takes_one(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    gm = trace(nn.Sequential(Twice(3, 5)).eval(), (x,))
    update = Update(random(0, 2, 3), random(1, 5, 2), 1.0, bias=random(2, 5))
    with pytest.warns(lora_fx.AdapterWarning, match="Twice does more than to multiply"):
        tuned, path = inject(gm, Adapter("a", {"0": update})), tmp_path / "m.onnx"
    lora_fx.to_onnx(tuned, path, adapters="input")
    lora_fx.export_adapter(lora_fx.adapter_from(tuned), path, tmp_path / "a.onnx_adapter")
    (found,) = lora_fx.Session(path).run({"input": x}, tmp_path / "a.onnx_adapter").values()
    with torch.no_grad():
        assert relative(torch.from_numpy(found), tuned(x)) < 1e-5
        assert relative(torch.from_numpy(found), gm(x)) > 1e-2
