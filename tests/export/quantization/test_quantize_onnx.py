"""Files of a decoder in a few bits, held against PEFT on a base of the same numbers.

The numbers are unpacked here from the bytes of the file, by the operators' definition.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import peft
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError, ExportError, VerificationError
from lora_fx.export import Session, add_lora, export_adapter, merge_onnx, quantize_onnx
from lora_fx.export.quantization.pack_file import outputs_off
from lora_fx.export.slots.manifest import read_manifest
from lora_fx.export.verification.file_run import Run
from lora_fx.testing import tiny
from lora_fx.testing.bitsandbytes import TABLES

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
TARGETS = ["q_proj", "v_proj", "up_proj"]
BITS = [4, 8, "nf4"]
LAYERS = 7
SIZES = {"num_hidden_layers": 1, "hidden_size": 40, "intermediate_size": 56}


def adapted(base: nn.Module, directory: Path | None = None, **options: Any) -> nn.Module:
    """PEFT around a copy of a base, with the same random weights each time."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **options)
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    source = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            change = torch.randn(parameter.shape, generator=source) * 0.3
            parameter.data = parameter.data + change
    if directory is not None:
        model.save_pretrained(directory)
    return model.eval()  # type: ignore[no-any-return]


def run(model: nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(input_ids=IDS).logits.numpy()
        return found


def unpacked(path: Path) -> dict[str, torch.Tensor]:
    """Path of a layer -> its weight (out, in), of the bytes of a file."""
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        given = {entry.name: entry.i for entry in node.attribute}
        if node.op_type == "MatMulNBits":
            numbers = _blocks(*(held[name] for name in node.input[1:]), **given)
        elif node.op_type == "MatMulBnb4":
            numbers = _table(held[node.input[1]], held[node.input[2]], **given)
        else:
            continue
        name = node.input[1].removesuffix("_Bnb4").partition("_Q")[0]
        found[node.input[1].partition(".weight_")[0]] = torch.from_numpy(numbers.copy())
        assert name.endswith(".weight")
    return found


def _blocks(q: Any, scales: Any, zeros: Any, K: int, N: int, bits: int, block_size: int) -> Any:
    def apart(packed: Any) -> Any:
        """Numbers of some bits, the first in the lowest."""
        shifts = np.arange(0, 8, bits)
        return (packed[..., None] >> shifts & (1 << bits) - 1).reshape(*packed.shape[:-1], -1)

    wide = apart(q).reshape(N, -1).astype(np.float32)[:, :K]
    factor, zero = (np.repeat(v, block_size, 1)[:, :K] for v in (scales, apart(zeros)))
    return ((wide - zero) * factor).astype(np.float32)


def _table(q: Any, largest: Any, K: int, N: int, block_size: int, quant_type: int) -> Any:
    assert quant_type == 1
    codes = [code for byte in q.tolist() for code in (byte >> 4, byte & 15)][: N * K]
    factors = torch.from_numpy(largest.copy()).repeat_interleave(block_size)[: N * K]
    return (TABLES["nf4"][codes] * factors).reshape(N, K).numpy()


def with_numbers(model: nn.Module, numbers: dict[str, torch.Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    for path, value in numbers.items():
        weight: Any = other.get_submodule(path).weight.detach()
        assert 1e-4 < float((weight - value).norm() / weight.norm()) < 0.2
        weight.copy_(value)
    return other


class Files:
    """A decoder, PEFT's adapters for it, and its files: merged, swappable, and in a few bits."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root, self.base = root, tiny("LlamaForCausalLM", **SIZES).eval()
        self.lora = adapted(self.base, root / "lora")
        self.dora = adapted(self.base, root / "dora", use_dora=True)
        dims = {0: "batch", 1: "length"}
        shapes = {"input_ids": dims}
        gm = lora_fx.trace(self.base, (), {"input_ids": IDS}, dynamic_shapes=shapes)
        self.gm = gm
        injected = lora_fx.inject(gm, lora_fx.load_adapter(root / "lora", base=self.base))
        lora_fx.to_onnx(lora_fx.fold(injected), root / "merged.onnx", verify=False)
        options = {"adapters": "input", "vectors": True, "verify": False}
        lora_fx.to_onnx(gm, root / "swappable.onnx", **options)
        self.reports = {
            (mode, bits): quantize_onnx(root / f"{mode}.onnx", self.path(mode, bits), bits=bits)
            for mode in ("merged", "swappable")
            for bits in BITS
        }

    def path(self, mode: str, bits: int | str) -> Path:
        return self.root / f"{mode}_{bits}.onnx"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("quantised"))


def off(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("bits", BITS)
def test_a_merged_file_is_the_merged_model_of_its_numbers(bits: Any, files: Files) -> None:
    numbers = unpacked(files.path("merged", bits))
    merged = copy.deepcopy(files.lora).merge_and_unload()  # type: ignore[operator]
    assert len(numbers) == LAYERS
    found = Session(files.path("merged", bits)).run({"input_ids": IDS})["logits"]
    assert off(found, run(with_numbers(merged, numbers))) <= 1e-5
    assert off(found, run(merged)) > 1e-3  # the control: plain weights
    assert off(found, run(files.base)) > 0.1  # and no adapter


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", BITS)
def test_a_swappable_file_is_peft_on_a_base_of_its_numbers(
    bits: Any, kind: str, files: Files, tmp_path: Path
) -> None:
    path, file = files.path("swappable", bits), tmp_path / "a.onnx_adapter"
    base = with_numbers(files.base, unpacked(path))
    expected = adapted(base)
    if kind == "dora":
        expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), files.root / "dora").eval()
    export_adapter(files.root / kind, path, file)
    session = Session(path)
    found = session.run({"input_ids": IDS}, file)["logits"]
    assert off(found, run(expected)) <= 1e-5
    assert off(session.run({"input_ids": IDS})["logits"], run(base)) <= 1e-5
    assert off(found, run(getattr(files, kind))) > 1e-3  # the control: a base of plain weights
    assert off(found, run(base)) > 0.1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_the_report_says_what_is_off_and_by_how_much(mode: str, bits: Any, files: Files) -> None:
    report = files.reports[mode, bits]
    said = report.quantised
    assert said is not None
    assert report.verified
    assert report.mode == mode
    assert said.left == {"lm_head": "a head"}
    plain = copy.deepcopy(files.lora).merge_and_unload() if mode == "merged" else files.base  # type: ignore[operator]
    for path, numbers in unpacked(files.path(mode, bits)).items():
        weight = plain.get_submodule(path).weight.detach()
        expected = float((weight - numbers).norm() / weight.norm())
        assert said.weights[path] == pytest.approx(expected, rel=1e-3)
    assert len(said.weights) == LAYERS
    tried = {"base", "adapted"} if mode == "swappable" else {"base"}
    assert {row.what for row in report.checks} == tried
    assert {row.what for row in report.controls} >= {"control: not quantised"}
    assert 1e-4 < said.outputs["logits"] < 0.5
    text = str(report)
    assert f"{LAYERS} weights in" in text
    assert max(said.weights, key=said.weights.__getitem__) in text
    assert f"weight and {LAYERS - 5} more " in text
    assert report.to_dict()["quantised"]["outputs"] == said.outputs


def test_adapters_heads_and_norms_stay_as_they_are(files: Files) -> None:
    before = {t.name: t for t in onnx.load(files.root / "swappable.onnx").graph.initializer}
    after = {t.name: t for t in onnx.load(files.path("swappable", 4)).graph.initializer}
    gone = {name for name in before if name not in after}
    assert len(gone) == LAYERS
    assert all(name.endswith("_proj.weight") for name in gone)
    same = [name for name in before if name in after]
    assert all(before[name].raw_data == after[name].raw_data for name in same)
    sizes = [sum(len(t.raw_data) for t in held.values()) for held in (before, after)]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_manifest_is_of_the_new_base(files: Files, tmp_path: Path) -> None:
    """A file of the float base is refused; the digest is that of the numbers."""
    plain = files.root / "swappable.onnx"
    export_adapter(files.root / "lora", plain, tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterError, match="made for another model"):
        Session(files.path("swappable", 4)).run({"input_ids": IDS}, tmp_path / "a.onnx_adapter")
    found = [
        read_manifest({e.key: e.value for e in onnx.load(path).metadata_props})
        for path in (plain, files.path("swappable", 4), files.path("swappable", 8))
    ]
    digests = [
        {slot.path: slot.digest for slot in manifest.slots} for manifest in found if manifest
    ]
    assert len(digests) == 3
    changed = [p for p in digests[0] if len({each[p] for each in digests}) == 3]
    assert len(changed) == LAYERS


def test_layers_may_be_chosen_and_kept(files: Files, tmp_path: Path) -> None:
    plain = files.root / "merged.onnx"
    some = quantize_onnx(plain, tmp_path / "a.onnx", layers=["*.mlp.*", "lm_head"], bits=8)
    assert some.quantised is not None
    assert {p.rpartition(".")[2] for p in some.quantised.weights} == {
        *("gate_proj", "up_proj", "down_proj", "lm_head")
    }
    rest = quantize_onnx(plain, tmp_path / "b.onnx", keep=["*.down_proj"], block_size=16)
    assert rest.quantised is not None
    assert rest.quantised.left["model.layers.0.mlp.down_proj"] == "asked for"
    assert "blocks of 16" in str(rest)
    with pytest.raises(ExportError, match=r"no layer at \*\.nope; there are model"):
        quantize_onnx(plain, tmp_path / "c.onnx", keep=["*.nope"])
    assert not (tmp_path / "c.onnx").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"bits": "int4"},
        {"block_size": 48},
        {"accuracy_level": 2},
        {"bits": "nf4", "symmetric": True},
    ],
)
def test_what_is_no_scheme_is_refused(options: Any, files: Files, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected"):
        quantize_onnx(files.root / "merged.onnx", tmp_path / "a.onnx", **options)


def test_inputs_in_eight_bits_are_faster_and_said(files: Files, tmp_path: Path) -> None:
    plain = files.root / "swappable.onnx"
    report = quantize_onnx(plain, tmp_path / "a.onnx", accuracy_level=4)
    exact, rounded = files.reports["swappable", 4].quantised, report.quantised
    assert exact is not None
    assert rounded is not None
    assert "x in 8 bits" in rounded.scheme
    assert rounded.weights == exact.weights
    assert rounded.outputs != exact.outputs
    assert report.verified
    nodes = [n for n in onnx.load(tmp_path / "a.onnx").graph.node if n.op_type == "MatMulNBits"]
    assert all(4 in [a.i for a in n.attribute if a.name == "accuracy_level"] for n in nodes)
    assert lora_fx.export.verify_onnx(files.gm, tmp_path / "a.onnx").verified


@pytest.mark.parametrize("bits", [4, 8])
def test_without_zero_points_blocks_are_rounded_around_zero(
    bits: Literal[4, 8], files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "a.onnx"
    report = quantize_onnx(files.root / "swappable.onnx", out, bits=bits, symmetric=True)
    other, found = files.reports["swappable", bits].quantised, report.quantised
    assert other is not None
    assert found is not None
    assert report.verified
    assert f"{bits} bits in blocks of 32, symmetric" in str(report)
    nodes = [node for node in onnx.load(out).graph.node if node.op_type == "MatMulNBits"]
    assert {len(node.input) for node in nodes} == {3}
    assert found.weights.keys() == other.weights.keys()
    assert all(
        other.weights[path] < off < 1.5 * other.weights[path] for path, off in found.weights.items()
    )
    assert lora_fx.export.verify_onnx(files.gm, out).verified


def test_verify_onnx_holds_a_file_to_its_numbers_and_those_to_the_model(files: Files) -> None:
    adapter = lora_fx.load_adapter(files.root / "lora", base=files.base)
    for mode in ("merged", "swappable"):
        path = files.path(mode, 4)
        report = lora_fx.export.verify_onnx(files.gm, path, adapters=[adapter])
        assert report.verified
        assert report.quantised is not None
        assert report.quantised.weights == pytest.approx(files.reports[mode, 4].quantised.weights)  # type: ignore[union-attr]
    with pytest.raises(VerificationError, match="weights are off by more than"):
        lora_fx.export.verify_onnx(files.gm, files.path("merged", 4))  # without the adapter


def test_a_quantised_file_is_not_quantised_again(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="quantised already"):
        quantize_onnx(files.path("merged", 4), tmp_path / "a.onnx", bits=8)


def test_merging_says_which_layers_cannot_take_it(files: Files, tmp_path: Path) -> None:
    path = files.path("swappable", "nf4")
    with pytest.raises(ExportError, match=r"q_proj: no weight of plain numbers"):
        merge_onnx(path, files.root / "lora", tmp_path / "a.onnx")
    report = merge_onnx(path, files.root / "lora", tmp_path / "a.onnx", allow_unmerged=True)
    assert report.verified
    assert report.mode == "unmerged"


@pytest.mark.parametrize("bits", BITS)
def test_slots_are_put_into_a_quantised_file(bits: Any, files: Files, tmp_path: Path) -> None:
    report = add_lora(files.path("merged", bits), tmp_path / "a.onnx")
    assert report.verified
    assert len(report.slots) == LAYERS + 1
    assert not any("without an adapter alone" in note for note in report.notes)


def test_a_directory_means_its_only_file(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="name one file"):
        quantize_onnx(files.root, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"no \.onnx file"):
        quantize_onnx(files.root / "lora", tmp_path / "a.onnx")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.onnx").write_bytes((files.root / "merged.onnx").read_bytes())
    assert quantize_onnx(tmp_path / "one", tmp_path / "a.onnx").verified


def of_two(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Two square layers."""
    h, source = onnx.helper, np.random.default_rng(0)
    held = [
        numpy_helper.from_array(source.standard_normal((16, 16)).astype(np.float32), name)
        for name in ("one.weight", "two.weight")
    ]
    x, y = (h.make_tensor_value_info(name, 1, ["n", 16]) for name in "xy")
    graph = h.make_graph(nodes, "g", [x], [y], held)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("named", [False, True])
def test_nodes_have_names_of_their_own(named: bool, tmp_path: Path) -> None:
    """Those of a file have none, or differ by the operator that both give up."""
    h, base, out = onnx.helper, tmp_path / "base.onnx", tmp_path / "q.onnx"
    nodes = [
        h.make_node("Identity", ["one.weight"], ["w"]),
        h.make_node("MatMul", ["x", "w"], ["h"], name="/fc/MatMul" if named else ""),
        h.make_node("Gemm", ["h", "two.weight"], ["y"], name="/fc/Gemm" if named else ""),
    ]
    onnx.save(of_two(*nodes), str(base))
    report = quantize_onnx(base, out, layers=["*"])
    assert report.quantised is not None
    assert sorted(report.quantised.weights) == ["one", "two"]
    assert add_lora(out, tmp_path / "slots.onnx").verified


def test_a_weight_that_may_be_given_stays(tmp_path: Path) -> None:
    h, base = onnx.helper, tmp_path / "base.onnx"
    nodes = [
        h.make_node("MatMul", ["x", "one.weight"], ["h"]),
        h.make_node("MatMul", ["h", "two.weight"], ["y"]),
    ]
    model = of_two(*nodes)
    model.graph.input.append(h.make_tensor_value_info("one.weight", 1, [16, 16]))
    onnx.save(model, str(base))
    report = quantize_onnx(base, tmp_path / "q.onnx", layers=["*"])
    assert report.quantised is not None
    assert list(report.quantised.weights) == ["two"]
    assert "may be given in place" in report.quantised.left["one"]


@pytest.mark.parametrize("places", [("one", "two"), ("two", "one")])
def test_outputs_are_as_far_off_as_the_farthest_of_some_runs(places: tuple[str, str]) -> None:
    plain = {(True, place): {"y": np.ones(4)} for place in places}
    off = {
        (True, place): {"y": np.full(4, 1 + n)} for place, n in zip(places, (0.1, 0.3), strict=True)
    }
    runs = (Run(Path("a.onnx"), known=off), Run(Path("b.onnx"), known=plain))
    assert outputs_off(*runs, {"one": {}, "two": {}}) == {"y": pytest.approx(0.3)}
