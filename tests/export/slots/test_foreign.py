"""Slots as onnxruntime-genai's builder and Olive leave them, in files made here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lora_fx import (
    Adapter,
    AdapterError,
    Update,
    inject,
    save_adapter,
    to_onnx,
    trace,
)
from lora_fx.cli.inspect import describe
from lora_fx.errors import ExportError
from lora_fx.export import Session, export_adapter, merge_onnx, quantize_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.numerics import compare
from lora_fx.testing import make_adapter

IN, OUT, RANK = 6, 9, 4
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
X = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Style:
    """How an exporter leaves its slots."""

    name: str  # of an input, by path and side
    attn: str = "self_attn"
    rank: str | int = "lora_r"
    has_default: bool = True
    turned: bool = False
    scale: float = 1.0


STYLES = {
    "genai's builder through Olive": Style("{path}.lora_{side}.MatMul.weight", attn="attn"),
    "Olive": Style("{path}.lora_{side}.weight"),
    "Olive, required": Style("{path}.lora_{side}.weight", has_default=False),
    "Olive, one rank": Style("{path}.lora_{side}.weight", rank=RANK),
    "one rank, required": Style("{path}.lora_{side}.weight", rank=RANK, has_default=False),
    "PEFT's own names and layout": Style(
        "base_model.model.{path}.lora_{side}.default.weight", turned=True, scale=0.5
    ),
    "ours without its manifest": Style("{path}.lora_{side}"),
}


def weights() -> list[np.ndarray[Any, Any]]:
    source = np.random.default_rng(0)
    shapes = (IN, OUT), (OUT, OUT)
    return [source.standard_normal(s).astype(np.float32) / 3 for s in shapes]


def written(style: Style, path: Path) -> Path:
    """Two layers with a branch each, and a function between them."""
    nodes, inputs, held, x = [], [helper.make_tensor_value_info("x", 1, ["b", "s", IN])], [], "x"
    for place, (layer, weight) in enumerate(zip(PATHS, weights(), strict=True)):
        held.append(numpy_helper.from_array(weight, f"w{place}"))
        own = layer.replace("self_attn", style.attn)
        at, y = "/" + own.replace(".", "/"), f"y{place}"
        down, up = (style.name.format(path=own, side=side) for side in "AB")
        for name, sizes in ((down, [weight.shape[0], style.rank]), (up, [style.rank, OUT])):
            shape = sizes[::-1] if style.turned else sizes
            inputs.append(helper.make_tensor_value_info(name, 1, shape))
            if style.has_default:
                empty = np.zeros([0 if isinstance(s, str) else s for s in shape], np.float32)
                held.append(numpy_helper.from_array(empty, name))
        if style.turned:
            for name in (down, up):
                nodes.append(helper.make_node("Transpose", [name], [f"{name}_t"], perm=[1, 0]))
            down, up = f"{down}_t", f"{up}_t"
        nodes += [
            helper.make_node("MatMul", [x, f"w{place}"], [f"{y}_base"], name=f"{at}/MatMul"),
            helper.make_node("MatMul", [x, down], [f"{y}_a"], name=f"{at}/lora_A/MatMul"),
            helper.make_node("MatMul", [f"{y}_a", up], [f"{y}_b"], name=f"{at}/lora_B/MatMul"),
        ]
        added = f"{y}_b"
        if style.scale != 1:
            held.append(numpy_helper.from_array(np.float32(style.scale), f"scale{place}"))
            nodes.append(helper.make_node("Mul", [added, f"scale{place}"], [f"{y}_s"]))
            added = f"{y}_s"
        nodes += [
            helper.make_node("Add", [f"{y}_base", added], [f"{y}_sum"], name=f"{at}/lora/Add"),
            helper.make_node("Tanh", [f"{y}_sum"], [y]),
        ]
        x = y
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["b", "s", OUT])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def adapter(rank: int = 3, **more: Any) -> Adapter:
    shapes = dict(zip(PATHS, ((OUT, IN), (OUT, OUT)), strict=True))
    return make_adapter(shapes, rank=rank, scale=0.4, **more)


def expected(adapter: Adapter | None) -> torch.Tensor:
    x = X
    for path, weight in zip(PATHS, weights(), strict=True):
        update: Any = None if adapter is None else adapter.updates[path]
        own = torch.from_numpy(weight)
        x = torch.tanh(x @ (own if update is None else own + update.delta().T))
    return x


@pytest.mark.parametrize("name", STYLES)
def test_an_adapter_of_peft_runs_in_a_file_of_another_exporter(name: str, tmp_path: Path) -> None:
    model, file = written(STYLES[name], tmp_path / "model.onnx"), tmp_path / "a.onnx_adapter"
    save_adapter(adapter(), tmp_path / "peft")
    export_adapter(tmp_path / "peft", model, file)
    session = Session(model)
    assert session.inputs == ["x"]
    assert len(session.slots) == 2
    assert compare(session.run({"x": X})["y1"], expected(None)).ok
    found = session.run({"x": X}, file)["y1"]
    assert compare(found, expected(adapter())).ok
    louder = Adapter(
        "l", {p: Update(u.down, u.up, u.scale * 1.1) for p, u in adapter().updates.items()}
    )  # type: ignore[attr-defined]
    assert compare(found, expected(louder)).relative > 1e-3
    assert compare(session.run({"x": X})["y1"], expected(None)).ok


@pytest.mark.parametrize("name", STYLES)
def test_a_file_of_another_exporter_is_merged(name: str, tmp_path: Path) -> None:
    model = written(STYLES[name], tmp_path / "model.onnx")
    report = merge_onnx(model, adapter(), tmp_path / "merged.onnx")
    assert report.verified
    assert report.mode == "merged"
    assert report.inputs == ["x"]
    graph = onnx.load(tmp_path / "merged.onnx").graph
    assert [n.op_type for n in graph.node] == ["MatMul", "Tanh", "MatMul", "Tanh"]
    assert compare(Session(tmp_path / "merged.onnx").run({"x": X})["y1"], expected(adapter())).ok


@pytest.mark.parametrize("ranks", [(3, 0), (2, 5)])
@pytest.mark.parametrize("name", [n for n, style in STYLES.items() if isinstance(style.rank, str)])
def test_ranks_that_a_file_calls_alike_are_made_so(
    name: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    """Of an adapter of some layers, or of a rank for each: onnxruntime plans memory for one."""
    model, file = written(STYLES[name], tmp_path / "model.onnx"), tmp_path / "a.onnx_adapter"
    every = {path: adapter(rank) for path, rank in zip(PATHS, ranks, strict=True) if rank}
    given = Adapter("own", {path: one.updates[path] for path, one in every.items()})
    none: Any = adapter().updates
    idle = {path: Update(u.down, u.up, 0.0) for path, u in none.items()}
    whole = Adapter("own", {**idle, **given.updates})
    export_adapter(given, model, file)
    found = Session(model).run({"x": X}, file)["y1"]
    assert compare(found, expected(whole)).ok
    assert compare(found, expected(None)).relative > 1e-2
    merge_onnx(model, given, tmp_path / "merged.onnx")
    assert compare(Session(tmp_path / "merged.onnx").run({"x": X})["y1"], expected(whole)).ok


@pytest.mark.parametrize("name", STYLES)
def test_a_file_of_another_exporter_is_quantised(name: str, tmp_path: Path) -> None:
    """Its slots may take one rank alone, or one at a time."""
    model, small = written(STYLES[name], tmp_path / "model.onnx"), tmp_path / "small.onnx"
    report = quantize_onnx(model, small, bits=8, block_size=16, layers=["*"])
    assert report.verified
    assert "MatMulNBits" in {node.op_type for node in onnx.load(small).graph.node}
    export_adapter(adapter(), small, tmp_path / "a.onnx_adapter")
    found = Session(small).run({"x": X}, tmp_path / "a.onnx_adapter")["y1"]
    assert 1e-5 < compare(found, expected(adapter())).relative < 2e-2
    assert compare(found, expected(None)).relative > 0.1


def test_what_is_known_of_the_base_is_said(tmp_path: Path) -> None:
    model = written(STYLES["Olive"], tmp_path / "model.onnx")
    report = describe(model)
    assert report["base"] == "unknown"
    assert [slot["path"] for slot in report["slots"]] == list(PATHS)
    assert report["inputs"] == ["x"]


def test_the_adapter_file_of_another_tool_runs_if_its_names_fit(tmp_path: Path) -> None:
    """A file of Olive's own has a model version of 0, or of anything."""
    one, two = (
        written(STYLES[n], tmp_path / f"{n}.onnx")
        for n in ("Olive", "genai's builder through Olive")
    )
    export_adapter(adapter(), one, tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterError, match=r"slots without a value: .*\.attn\..*lora_A\.MatMul"):
        Session(two).run({"x": X}, tmp_path / "a.onnx_adapter")
    plain = Style("{path}.lora_{side}.weight", has_default=False)
    other = written(plain, tmp_path / "other.onnx")
    found = Session(other).run({"x": X}, tmp_path / "a.onnx_adapter")["y1"]
    assert compare(found, expected(adapter())).ok


def test_a_rank_that_a_file_does_not_take_is_refused(tmp_path: Path) -> None:
    model = written(STYLES["Olive, one rank"], tmp_path / "model.onnx")
    with pytest.raises(AdapterError, match=r"q_proj: rank 5, and the file takes 4 and no other"):
        export_adapter(adapter(rank=5), model, tmp_path / "a.onnx_adapter")


def test_names_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    model = written(STYLES["Olive"], tmp_path / "model.onnx")
    wrong = Adapter("w", {"model.layers.1.attn.q_proj": next(iter(adapter().updates.values()))})
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.attn\.q_proj"):
        export_adapter(wrong, model, tmp_path / "a.onnx_adapter")
    shapes = Adapter("s", {PATHS[0]: adapter().updates[PATHS[1]]})
    with pytest.raises(AdapterError, match="q_proj"):
        export_adapter(shapes, model, tmp_path / "a.onnx_adapter")
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_what_only_bears_the_name_of_a_slot_is_told_when_an_adapter_is_made(tmp_path: Path) -> None:
    model = onnx.load(written(STYLES["Olive"], tmp_path / "model.onnx"))
    lost = f"{PATHS[1]}.lora_B.weight"
    for node in model.graph.node:
        if lost in node.input:
            node.op_type = "Mod"
    onnx.save(model, str(tmp_path / "odd.onnx"))
    assert manifest_in(load_proto(tmp_path / "odd.onnx"), tmp_path / "odd.onnx").names  # type: ignore[union-attr]
    with pytest.raises(ExportError, match=r"lora_B.weight goes into Mod.*lora_fx\.slots, which"):
        export_adapter(adapter(), tmp_path / "odd.onnx", tmp_path / "a.onnx_adapter")


def test_a_factor_that_is_multiplied_from_the_left_is_told(tmp_path: Path) -> None:
    model = onnx.load(written(STYLES["Olive"], tmp_path / "model.onnx"))
    for node in model.graph.node:
        if f"{PATHS[1]}.lora_B.weight" in node.input:
            node.input[:] = reversed(node.input)
    onnx.save(model, str(tmp_path / "odd.onnx"))
    with pytest.raises(ExportError, match=r"up_proj: .*lora_B.weight is multiplied from the left"):
        export_adapter(adapter(), tmp_path / "odd.onnx", tmp_path / "a.onnx_adapter")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_sum_that_onnxruntime_fused_into_a_product_is_one(
    has_bias: bool, alpha: float, tmp_path: Path
) -> None:
    """Of two axes, it makes a Gemm of ``base + h @ B``; what a Gemm scales by is of the branch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8, bias=has_bias), nn.Tanh()).eval()
    x, given = torch.randn(5, 12), make_adapter({"0": (8, 12)}, rank=3, scale=0.4)
    gm = trace(net, (x,), dynamic_shapes=({0: "batch"},))
    to_onnx(gm, tmp_path / "plain.onnx", adapters="required", slots=["0"])
    options, out = ort.SessionOptions(), tmp_path / "fused.onnx"
    options.optimized_model_filepath = str(out)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(tmp_path / "plain.onnx"), options)
    model = onnx.load(out)
    del model.metadata_props[:]
    (fused,) = (n for n in model.graph.node if n.op_type == "Gemm" and "0.lora_B" in n.input)
    others = [a for a in fused.attribute if a.name != "alpha"]
    del fused.attribute[:]
    fused.attribute.extend([*others, helper.make_attribute("alpha", alpha)])
    onnx.save(model, str(out))
    export_adapter(given, out, tmp_path / "a.onnx_adapter")
    merge_onnx(out, given, tmp_path / "merged.onnx")
    with torch.no_grad():
        base, tuned = gm(x), inject(gm, given)(x)
    found = Session(out).run({"input": x}, tmp_path / "a.onnx_adapter")["output"]
    merged = Session(tmp_path / "merged.onnx").run({"input": x})["output"]
    assert compare(found, tuned).ok
    assert compare(merged, tuned).ok
    assert compare(base, tuned).relative > 0.1
    others = [a for a in fused.attribute if a.name != "beta"]
    del fused.attribute[:]
    fused.attribute.extend([*others, helper.make_attribute("beta", 2.0)])  # twice the base
    onnx.save(model, str(tmp_path / "twice.onnx"))
    with pytest.raises(ExportError, match="0: what it adds goes into Gemm"):
        merge_onnx(tmp_path / "twice.onnx", given, tmp_path / "m.onnx", verify=False)
