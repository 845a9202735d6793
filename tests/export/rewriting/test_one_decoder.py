"""Two steps in one file, whose weights stand there once where they are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lora_fx import Session, to_onnx, trace
from lora_fx.errors import ExportError
from lora_fx.export import join_decoders
from lora_fx.export.onnx_model.model_file import load_proto
from lora_fx.export.rewriting.one_decoder import FLAG


class Step(nn.Module):
    def __init__(self, seed: int, more: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Linear(4, 5)
        torch.manual_seed(seed)
        self.own, self.more = nn.Linear(5, 4), more

    def forward(self, x: torch.Tensor, past: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.both(x) if past is None else self.both(x) * past
        found = {"logits": self.own(hidden), "present.x": hidden}
        return found | {"present.encoder.x": x.tanh()} if self.more else found


def written(
    path: Path, model: nn.Module, *inputs: torch.Tensor, told: bool = True, **options: Any
) -> Path:
    gm = trace(model.eval(), inputs, dynamic_shapes=tuple({0: "batch_size"} for _ in inputs))
    to_onnx(gm, path, **options)
    if not told:
        proto = onnx.load(path)
        del proto.metadata_props[:]
        onnx.save(proto, path)
    return path


@pytest.mark.parametrize("told", [True, False])
def test_weights_of_one_name_are_shared_where_they_are_equal(told: bool, tmp_path: Path) -> None:
    x, past = torch.randn(3, 4), torch.randn(3, 5)
    first, later = Step(1, True), Step(2, False)
    files = (
        written(tmp_path / "first.onnx", first, x, told=told),
        written(tmp_path / "later.onnx", later, x, past, told=told),
    )
    report = join_decoders(*files, tmp_path / "one.onnx")
    assert report.verified
    graph = load_proto(tmp_path / "one.onnx").graph
    assert len([t for t in graph.initializer if len(t.dims) == 2]) == (3 if told else 4)
    values = [t.name for t in graph.initializer] + [v.name for v in graph.output]
    values += [o for b in graph.node[0].attribute for n in b.g.node for o in n.output]
    assert len(values) == len(set(values))  # which onnxslim wants, in any branch
    session = Session(tmp_path / "one.onnx")
    feeds = {"x": x, "past": past}
    for step, wanted in ((False, first(x)), (True, later(x, past))):
        found = session.run(feeds | {FLAG: np.array([step])})
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value.detach(), rtol=1e-5, atol=1e-6)
        assert found["present.encoder.x"].shape == ((0, 4) if step else (3, 4))
    assert not np.allclose(
        session.run(feeds | {FLAG: np.array([False])})["logits"], found["logits"]
    )
    with pytest.raises(ExportError, match="exists"):
        join_decoders(*files, tmp_path / "one.onnx")


def test_what_are_no_steps_of_one_decoder_is_refused(tmp_path: Path) -> None:
    x, past = torch.randn(3, 4), torch.randn(3, 5)
    first = written(tmp_path / "first.onnx", Step(1, True), x)
    later = written(tmp_path / "later.onnx", Step(2, False), x, past)
    slots = written(tmp_path / "slots.onnx", Step(2, False), x, past, adapters="input")
    wide = written(tmp_path / "wide.onnx", Step(2, False).double(), x.double(), past.double())
    out = tmp_path / "one.onnx"
    for pair, said in (
        (
            (later, first),
            r"first\.onnx: gives present\.encoder\.x, which later\.onnx does not: give",
        ),
        ((first, first), r"first\.onnx: takes nothing that first\.onnx does not, such as a cache"),
        ((first, wide), r"wide\.onnx: takes x in another type than first\.onnx: give"),
        ((first, slots), r"slots\.onnx: has slots, .*: give it merged"),
        ((first, tmp_path / "none.onnx"), r"none\.onnx: cannot be read: No such file"),
    ):
        with pytest.raises(ExportError, match=said):
            join_decoders(*pair, out)
    content = later.read_bytes()
    for file in (first, later):
        with pytest.raises(ExportError, match=r"is an input|is read"):
            join_decoders(first, later, file, force=True)
    assert later.read_bytes() == content
    assert not out.exists()


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    x, past = torch.randn(3, 4), torch.randn(3, 5)
    pair = [
        written(tmp_path / "first.onnx", Step(1, True), x),
        written(tmp_path / "later.onnx", Step(2, False), x, past),
    ]
    proto = onnx.load(pair[1])
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    weight.raw_data = weight.raw_data[::-1]
    onnx.save(proto, pair[1])
    with pytest.raises(ExportError, match=r"later\.onnx: not what was exported"):
        join_decoders(*pair, tmp_path / "one.onnx")
    assert not (tmp_path / "one.onnx").exists()
