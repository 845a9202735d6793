"""A swappable file and an adapter become a merged file, held against eager."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lora_fx import Adapter, inject, trace
from lora_fx.errors import AdapterError, ExportError, VerificationError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx, to_onnx
from lora_fx.export.onnx_model.digests import KEY, metadata
from lora_fx.export.rewriting import merge
from lora_fx.export.rewriting.file_layers import types_of_numbers
from lora_fx.export.rewriting.merged_tensor import Change, MergedTensor
from lora_fx.export.slots.choose import chosen_slots
from lora_fx.export.slots.probe import probe
from lora_fx.formats import save_adapter
from lora_fx.numerics import compare
from lora_fx.testing import Attention, Experts, Ragged, Shared, Tied, make_adapter


def louder(adapter: Adapter) -> Adapter:
    updates: Any = adapter.updates
    return Adapter("louder", {p: replace(u, scale=1.1 * u.scale) for p, u in updates.items()})


def test_merged_is_eager_with_the_adapter_and_the_file_that_an_export_gives(
    exported: Any, tmp_path: Path
) -> None:
    sample, out = exported.sample, tmp_path / "merged.onnx"
    adapter = sample.adapter(2)
    report = merge_onnx(exported.path("input"), adapter, out)
    assert report.verified
    assert report.mode == "merged"
    session = Session(out)
    assert session.slots == []
    found = session.run(sample.other)
    pairs = zip(sample.eager(adapter), sample.eager(louder(adapter)), sample.eager(), strict=True)
    for value, (wanted, loud, base) in zip(found.values(), pairs, strict=True):
        assert compare(value, wanted).ok
        assert compare(value, loud).relative > 1e-3
        assert compare(value, base).relative > 1e-2
    mine, theirs = (onnx.load(p).graph for p in (out, exported.path("folded")))
    assert [o.name for o in mine.output] == [o.name for o in theirs.output]
    assert {t.name for t in mine.initializer} >= {
        t.name for t in theirs.initializer if not t.name.startswith("val_")
    }
    assert not [t.name for t in mine.initializer if ".lora_" in t.name]
    kinds = [Counter(n.op_type for n in g.node if n.op_type != "Constant") for g in (mine, theirs)]
    assert sum(kinds[0].values()) == sum(kinds[1].values())


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


class Computed(nn.Module):
    """A layer whose bias is no weight, but made of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(x.sum().expand(5), x, self.w)


IDS, ROWS, IMAGES = torch.randint(0, 6, (2, 3)), torch.randn(4, 6, 3), torch.randn(2, 4, 8)
CASES: dict[str, tuple[nn.Module, torch.Tensor, Any, bool]] = {
    "linear": (Ragged(), ROWS, "all-linear", False),
    "with vectors": (Ragged(), ROWS, "all-linear", True),
    "weights made at each call": (Ragged(), torch.randn(4, 300, 3), "all-linear", False),
    "whole and factors": (Ragged(), ROWS, {"wide": "weight", "narrow": "factors"}, False),
    "convolutions": (
        chain(nn.Conv1d(4, 6, 3, bias=False), nn.ReLU(), nn.ConvTranspose1d(6, 5, 3)),
        IMAGES, ["0", "2"], True,
    ),
    "packed": (Attention(4), torch.randn(2, 3, 4), "all-linear", True),
    "packed in parts": (Attention(4, crossed=True), torch.randn(2, 3, 4), "all-linear", False),
    "experts": (Experts(), torch.randn(2, 3, 4), ["up_proj"], False),
    "a table that is the head": (Tied(), IDS, ["table"], False),
    "a table with vectors": (chain(nn.Embedding(7, 5)), IDS, ["0"], True),
    "two names": (Shared(), torch.randn(4, 3), "all-linear", False),
    "a bias that is computed": (Computed(), torch.randn(4, 3), ["w"], True),
    "half": (Ragged().half(), ROWS.half(), "all-linear", True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_slot_goes_into_its_weight(case: str, tmp_path: Path) -> None:
    model, x, slots, vectors = CASES[case]
    gm, path, out = trace(model.eval(), (x,)), tmp_path / "model.onnx", tmp_path / "merged.onnx"
    to_onnx(gm, path, adapters="input", slots=slots, vectors=vectors)
    adapter = probe(chosen_slots(gm, slots, vectors), (2, 3), 1, gm)
    report = merge_onnx(path, adapter, out)
    assert report.mode == "merged"
    found = Session(out).run({Session(out).inputs[0]: x})
    with torch.no_grad():
        adapted, base = inject(gm, adapter)(x), gm(x)
    wanted = list(adapted.values()) if isinstance(adapted, dict) else [adapted]
    plain = list(base.values()) if isinstance(base, dict) else [base]
    for value, one, other in zip(found.values(), wanted, plain, strict=True):
        assert compare(value, one).ok
        assert compare(value, other).relative > 1e-2


def test_a_bias_goes_into_the_bias_and_no_node_stays(tmp_path: Path) -> None:
    gm, path = trace(Ragged().eval(), (ROWS,)), tmp_path / "model.onnx"
    to_onnx(gm, path, adapters="input", vectors=True, slots="all-linear")
    adapter = probe(chosen_slots(gm, "all-linear", True), (2,), 1, gm)
    merge_onnx(path, adapter, tmp_path / "merged.onnx")
    graph = onnx.load(tmp_path / "merged.onnx").graph
    wide = [n.op_type for n in graph.node][: [n.op_type for n in graph.node].index("Tanh")]
    assert wide in (["MatMul", "Add"], ["Gemm"])
    biases = {
        t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer if "bias" in t.name
    }
    added: Any = adapter.updates["wide"]
    assert compare(biases["wide.bias"], gm.wide.bias.detach() + added.bias * added.scale).ok
    assert sorted(biases) == ["again.bias", "narrow.bias", "wide.bias"]  # two had none


def test_what_an_adapter_leaves_alone_is_the_base_bit_for_bit(
    exported: Any, tmp_path: Path
) -> None:
    sample = exported.sample
    whole = sample.adapter(2)
    first = next(iter(whole.updates))
    merge_onnx(
        exported.path("input"), Adapter("one", {first: whole.updates[first]}), tmp_path / "m"
    )
    before, after = (tensors(p) for p in (exported.path("input"), tmp_path / "m"))
    changed = [n for n in after if not np.array_equal(before[n], after[n])]
    assert changed == [f"{first}.weight"]


def tensors(path: Path) -> Mapping[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("beside", [0, 10**9])
def test_a_second_run_writes_the_same_bytes(beside: int, exported: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        merge_onnx(
            exported.path("input"), exported.sample.adapter(2), tmp_path / name / "m.onnx",
            external_data_above=beside,
        )  # fmt: skip
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == (["m.onnx"] if beside else ["m.onnx", "m.onnx.data"])
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_weights_beside_the_file_are_copied_and_the_result_is_sealed(tmp_path: Path) -> None:
    model, x = chain(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 9)), torch.randn(4, 8)
    gm, path = trace(model, (x,)), tmp_path / "model.onnx"
    to_onnx(gm, path, adapters="input", slots=["0"], external_data_above=0)
    adapter, out = probe(chosen_slots(gm, ["0"]), (2,), 1, gm), tmp_path / "m.onnx"
    merge_onnx(path, adapter, out, external_data_above=0)
    (found,) = Session(out).run({"input": x}).values()
    assert compare(found, inject(gm, adapter)(x).detach()).ok
    digests = [json.loads(metadata(onnx.load(p))[KEY])["tensors"] for p in (path, out)]
    same = {name for name in digests[1] if digests[0].get(name) == digests[1][name]}
    assert same == {"0.bias", "2.weight", "2.bias"}
    for place in range(0, (data := tmp_path / "m.onnx.data").stat().st_size, 4096):
        content = bytearray(data.read_bytes())
        content[place] ^= 1
        data.write_bytes(content)
        with pytest.raises(ExportError, match="not what was exported: other values in"):
            Session(out)
        content[place] ^= 1
        data.write_bytes(content)


def test_an_adapter_of_any_source(exported_mlp: Any, tmp_path: Path) -> None:
    path, adapter = exported_mlp.path("input"), exported_mlp.sample.adapter(2)
    save_adapter(adapter, tmp_path / "peft", format="peft")
    export_adapter(adapter, path, tmp_path / "a.onnx_adapter")
    for place, source in enumerate((adapter, tmp_path / "peft", tmp_path / "a.onnx_adapter")):
        merge_onnx(path, source, tmp_path / f"{place}.onnx")
    first = tensors(tmp_path / "0.onnx")
    for place in (1, 2):
        assert all(
            np.array_equal(v, first[n]) for n, v in tensors(tmp_path / f"{place}.onnx").items()
        )


class TestRefused:
    """What is not merged leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path: Path) -> Any:
        yield
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(("out", ".out"))]

    def test_a_file_without_slots(self, exported_mlp: Any, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="takes no adapter"):
            merge_onnx(
                exported_mlp.path("folded"), exported_mlp.sample.adapter(2), tmp_path / "out.onnx"
            )

    def test_an_adapter_of_another_model(self, exported_mlp: Any, tmp_path: Path) -> None:
        other = Adapter(
            "other", {"nowhere": next(iter(exported_mlp.sample.adapter(2).updates.values()))}
        )
        with pytest.raises(AdapterError, match="nowhere"):
            merge_onnx(exported_mlp.path("input"), other, tmp_path / "out.onnx")

    def test_a_file_that_was_changed(self, exported_mlp: Any, tmp_path: Path) -> None:
        model = onnx.load(exported_mlp.path("input"))
        weight = next(t for t in model.graph.initializer if t.name == "up.weight")
        weight.raw_data = (numpy_helper.to_array(weight) * 2).tobytes()
        onnx.save(model, str(tmp_path / "changed.onnx"))
        for verify in (True, False):
            with pytest.raises(ExportError, match=r"other values in up\.weight"):
                merge_onnx(
                    tmp_path / "changed.onnx", exported_mlp.sample.adapter(2),
                    tmp_path / "out.onnx",
                    verify=verify,
                )  # fmt: skip

    def test_a_weight_that_was_merged_wrong(
        self, exported_mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sample = exported_mlp.sample
        kept = merge.merged_model

        def wrong(load: Any, manifest: Any, values: Any) -> Any:
            return kept(load, manifest, {n: v * 1.1 for n, v in values.items()})

        monkeypatch.setattr(merge, "merged_model", wrong)
        with pytest.raises(VerificationError, match="checks disagree with the file beside it"):
            merge_onnx(exported_mlp.path("input"), sample.adapter(2), tmp_path / "out.onnx")

    def test_an_adapter_without_effect(self, exported_mlp: Any, tmp_path: Path) -> None:
        adapter = exported_mlp.sample.adapter(2)
        updates: Any = adapter.updates
        silent = Adapter("s", {p: replace(u, scale=1e-9) for p, u in updates.items()})
        with pytest.raises(VerificationError, match="the control agrees"):
            merge_onnx(exported_mlp.path("input"), silent, tmp_path / "out.onnx")


def test_the_adapter_s_own_file_is_not_replaced(exported_mlp: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    export_adapter(exported_mlp.sample.adapter(2), exported_mlp.path("input"), file)
    before = file.read_bytes()
    with pytest.raises(ExportError, match=r"a\.onnx"):
        merge_onnx(exported_mlp.path("input"), file, file, force=True)
    assert file.read_bytes() == before


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = chain(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2))
    gm, path = trace(model, (torch.randn(2, 4, 8, 8),)), tmp_path_factory.mktemp("g") / "model.onnx"
    to_onnx(gm, path, adapters="input", slots=["0", "2"], vectors=True)
    return gm, path


def test_groups_that_are_mixed_stay_beside_and_it_is_said(grouped: Any, tmp_path: Path) -> None:
    gm, path = grouped
    adapter = probe(chosen_slots(gm, ["0", "2"], True), (2,), 1, gm)
    with pytest.raises(ExportError, match=r"not merged: 0: it mixes the groups .*allow_unmerged"):
        merge_onnx(path, adapter, tmp_path / "m.onnx")
    report = merge_onnx(path, adapter, tmp_path / "m.onnx", allow_unmerged=True)
    assert report.verified
    assert report.mode == "unmerged"
    x = torch.randn(2, 4, 8, 8)
    session = Session(tmp_path / "m.onnx")
    assert session.inputs == ["input"]
    assert session.slots == []
    found = torch.from_numpy(session.run({"input": x})["output"])
    assert compare(found, inject(gm, adapter)(x).detach()).ok


def test_groups_that_are_not_mixed_are_merged(grouped: Any, tmp_path: Path) -> None:
    gm, path = grouped
    whole = probe(chosen_slots(gm, ["0", "2"], True), (2,), 1, gm)
    updates: dict[str, Any] = {}
    for name, update in whole.updates.items():
        made: Any = update
        out, into = made.up.shape[0] // 2, made.down.shape[1] // 2
        up, down = torch.zeros_like(made.up), torch.zeros_like(made.down)
        up[:out, 0], up[out:, 1] = made.up[:out, 0], made.up[out:, 1]
        down[0, :into], down[1, into:] = made.down[0, :into], made.down[1, into:]
        updates[name] = replace(made, up=up, down=down)
    adapter = Adapter("apart", updates)
    assert merge_onnx(path, adapter, tmp_path / "m.onnx").mode == "merged"
    x = torch.randn(2, 4, 8, 8)
    found = Session(tmp_path / "m.onnx").run({"input": x})["output"]
    assert compare(found, inject(gm, adapter)(x).detach()).ok
    assert compare(found, gm(x).detach()).relative > 1e-2


def test_a_branch_that_hands_on_what_a_layer_gives(tmp_path: Path) -> None:
    """``If(c): Identity(y)`` keeps its output, which is named in the branch alone."""
    h, weight = onnx.helper, np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    branches = {
        f"{name}_branch": h.make_graph(
            [h.make_node(kind, ["y"], [name])], name, [], [h.make_tensor_value_info(name, 1, None)]
        )
        for name, kind in (("then", "Identity"), ("else", "Neg"))
    }
    nodes = [
        h.make_node("MatMul", ["x", "fc.weight"], ["y"]),
        h.make_node("If", ["is_so"], ["z"], **branches),
    ]
    x, z = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("z", 5)))
    is_so = h.make_tensor_value_info("is_so", onnx.TensorProto.BOOL, [])
    held = [numpy_helper.from_array(weight, "fc.weight")]
    graph = h.make_graph(nodes, "g", [x, is_so], [z], held)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "base.onnx"))
    adapter = make_adapter({"fc": (5, 3)}, scale=0.3)
    add_lora(tmp_path / "base.onnx", tmp_path / "slots.onnx")
    merge_onnx(tmp_path / "slots.onnx", adapter, tmp_path / "m.onnx")
    update: Any = adapter.updates["fc"]
    own, rows = torch.from_numpy(weight), ROWS[0]
    wanted = rows @ (own + update.delta().T)
    for is_first, sign in ((True, 1), (False, -1)):
        found = Session(tmp_path / "m.onnx").run({"x": rows, "is_so": np.array(is_first)})["z"]
        assert compare(found, sign * wanted).ok
        assert compare(found, sign * rows @ own).relative > 1e-2


def test_a_weight_of_whole_numbers_takes_no_update(tmp_path: Path) -> None:
    """It is cast where it is read, and would round what is added."""
    h, weight = onnx.helper, np.random.default_rng(0).integers(-50, 50, (3, 5)).astype(np.int8)
    cast = h.make_node("Cast", ["fc.weight"], ["w"], to=1)
    nodes = [cast, h.make_node("MatMul", ["x", "w"], ["y"])]
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("y", 5)))
    graph = h.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "fc.weight")])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "base.onnx"))
    adapter, slots = make_adapter({"fc": (5, 3)}, scale=8.0), tmp_path / "slots.onnx"
    add_lora(tmp_path / "base.onnx", slots)
    with pytest.raises(ExportError, match=r"fc: its weight fc\.weight is stored as INT8"):
        merge_onnx(slots, adapter, tmp_path / "m.onnx", verify=False)
    assert merge_onnx(slots, adapter, tmp_path / "m.onnx", allow_unmerged=True).verified


def test_a_file_is_held_to_what_its_weights_are_read_in_but_for_one_that_is_made_anew() -> None:
    h, half = onnx.helper, numpy_helper.from_array(np.ones((3, 5), np.float16), "fc.weight")
    nodes = [h.make_node("Cast", ["fc.weight"], ["w"], to=1), h.make_node("MatMul", "xw", "y")]
    x, y = (h.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 3), ("y", 5)))
    model = ir.from_proto(h.make_model(h.make_graph(nodes, "g", [x], [y], [half])))
    assert types_of_numbers(model) == {"float32"}
    weight = model.graph.initializers["fc.weight"]
    assert weight.const_value is not None
    weight.const_value = MergedTensor(weight.const_value, ("in", "out"), [Change()], weight.name)
    assert types_of_numbers(model) == {"float16", "float32"}


def test_a_branch_beside_half_of_itself_is_told(tmp_path: Path) -> None:
    """The rank of what it reads is open, so that it has no sizes to hold against a layer's."""
    file = tmp_path / "slots.onnx"
    to_onnx(
        trace(nn.Sequential(nn.Linear(3, 5)), (torch.ones(2, 3),)),
        file,
        adapters="input",
        verify=False,
    )
    proto = onnx.load(file)
    by_input = {node.input[1]: node for node in proto.graph.node if node.op_type == "MatMul"}
    up = by_input["0.lora_B"]
    total = next(node for node in proto.graph.node if up.output[0] in node.input)
    total.input[[*total.input].index(up.output[0]) - 1] = by_input["0.lora_A"].output[0]
    del proto.metadata_props[[e.key for e in proto.metadata_props].index(KEY)]
    onnx.save(proto, file)
    with pytest.raises(
        ExportError, match=r"0: its weight 0\.lora_A is stored in a way that is not"
    ):
        merge_onnx(file, make_adapter({"0": (5, 3)}), tmp_path / "m.onnx")
