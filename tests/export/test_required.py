"""Files whose slots have no default: every kind of slot, fed from either kind of adapter file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx import Adapter, ExportError, VerificationError, inject, load_adapter
from lora_fx import trace as traced
from lora_fx.cli.inspect import describe
from lora_fx.export import (
    CalibrationReader,
    Session,
    add_lora,
    export_adapter,
    merge_onnx,
    to_onnx,
    verify_onnx,
)
from lora_fx.export.onnx_model.digests import KEY as DIGESTS
from lora_fx.export.slots import adapter_file
from lora_fx.export.slots.choose import chosen_slots
from lora_fx.export.slots.manifest import KEY
from lora_fx.export.slots.probe import probe
from lora_fx.export.verification.verify_onnx import check_adapter_files
from lora_fx.numerics import compare
from lora_fx.testing import Attention, Experts, Ragged, Tied

ENDINGS = (".onnx_adapter", ".safetensors")
ROWS, IMAGES = torch.randn(4, 6, 3), torch.randn(2, 4, 8)


class TiedHead(nn.Module):
    """A table that a head of another name is too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids below 6, (...) -> (..., 6)."""
        made: torch.Tensor = self.head(torch.tanh(self.table(ids)))
        return made


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


# A model, its input, its slots, and whether they take vectors.
CASES: dict[str, tuple[nn.Module, torch.Tensor, Any, bool]] = {
    "linear": (Ragged(), ROWS, "all-linear", False),
    "with vectors": (Ragged(), ROWS, "all-linear", True),
    "weights made at each call": (Ragged(), torch.randn(4, 300, 3), "all-linear", False),
    "whole tensors alone": (Ragged(), ROWS, {"wide": "weight", "wide.bias": "weight"}, False),
    "whole and factors": (Ragged(), ROWS, {"wide": "weight", "narrow": "factors"}, False),
    "convolutions": (
        chain(nn.Conv1d(4, 6, 3, bias=False), nn.ReLU(), nn.ConvTranspose1d(6, 5, 3)),
        IMAGES, ["0", "2"], True,
    ),
    "packed": (Attention(4), torch.randn(2, 3, 4), "all-linear", True),
    "experts": (Experts(), torch.randn(2, 3, 4), ["up_proj"], False),
    "a table that is the head": (Tied(), torch.randint(0, 6, (2, 3)), ["table"], False),
    "a whole head that is the table": (
        TiedHead(), torch.randint(0, 6, (2, 3)), {"head": "weight"}, False
    ),
    "half": (Ragged().half(), ROWS.half(), "all-linear", True),
}  # fmt: skip


@dataclass(frozen=True)
class Required:
    """A case's file and graph, two adapters, the files of both and of none, and what they give."""

    home: Path
    gm: Any
    x: torch.Tensor
    report: Any
    adapters: dict[str, Adapter | None]
    results: dict[str, list[torch.Tensor]]

    @property
    def model(self) -> Path:
        return self.home / "model.onnx"

    def file(self, name: str, ending: str) -> Path:
        return self.home / f"{name}{ending}"

    def eager(self, name: str) -> list[torch.Tensor]:
        return self.results[name]

    def found(self, session: Session, file: Path | None) -> list[Any]:
        return list(session.run({session.inputs[0]: self.x}, file).values())


@pytest.fixture(scope="module", params=CASES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Required:
    torch.manual_seed(0)
    model, x, slots, vectors = CASES[request.param]
    gm, home = traced(model.eval(), (x,)), tmp_path_factory.mktemp("required")
    report = to_onnx(gm, home / "model.onnx", adapters="required", slots=slots, vectors=vectors)
    adapters: dict[str, Adapter | None] = {"none": None}
    for seed, name in enumerate(("french", "legal")):
        made = probe(chosen_slots(gm, slots, vectors), (2, 3), seed, gm)
        adapters[name] = replace(made, name=name)
    for name, adapter in adapters.items():
        for ending in ENDINGS:
            export_adapter(adapter, home / "model.onnx", home / f"{name}{ending}")
    with torch.no_grad():
        results = {
            name: pytree.tree_leaves((inject(gm, adapter) if adapter else gm)(x))
            for name, adapter in adapters.items()
        }
    return Required(home, gm, x, report, adapters, results)


def agree(found: list[Any], wanted: list[Any]) -> bool:
    return all(compare(a, b).ok for a, b in zip(found, wanted, strict=True))


def test_no_slot_has_a_default_and_the_report_says_so(case: Required) -> None:
    graph = onnx.load(case.model).graph
    held, inputs = {t.name for t in graph.initializer}, {v.name for v in graph.input}
    assert held.isdisjoint(inputs)
    listed = json.loads(metadata(case.model)[KEY])["slots"]
    assert inputs.difference(case.report.inputs) == {n for slot in listed for n in slot["inputs"]}
    assert case.report.mode == "required"
    assert case.report.verified
    assert {row.what for row in case.report.checks} == {"base", "adapted"}
    assert describe(case.model)["required"]
    assert describe(case.model)["inputs"] == case.report.inputs


def metadata(path: Path) -> dict[str, str]:
    proto = onnx.load(path, load_external_data=False)
    return {entry.key: entry.value for entry in proto.metadata_props}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_session_runs_the_base_and_adapters_by_turns(ending: str, case: Required) -> None:
    session = Session(case.model)
    for name in ("none", "french", "legal", "none", "french"):
        found = case.found(session, case.file(name, ending))
        assert agree(found, case.eager(name))
        others = [other for other in case.adapters if other != name]
        assert not any(agree(found, case.eager(other)) for other in others)
    assert agree(case.found(session, None), case.eager("none"))


def test_safetensors_have_a_value_for_every_slot_and_none_is_empty(case: Required) -> None:
    graph = onnx.load(case.model).graph
    slots = {v.name for v in graph.input}.difference(case.report.inputs)
    for name in case.adapters:
        values = describe(case.file(name, ".safetensors"))["values"]
        assert {value["name"] for value in values} == slots
        assert all(np.prod(value["shape"]) for value in values)


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_is_merged_and_an_adapter_is_read_back(
    ending: str, case: Required, tmp_path: Path
) -> None:
    out, file = tmp_path / "merged.onnx", case.file("french", ending)
    report = merge_onnx(case.model, file, out)
    assert (report.verified, report.mode) == (True, "merged")
    assert not [t.name for t in onnx.load(out).graph.initializer if "_base" in t.name]
    found = case.found(Session(out), None)
    assert agree(found, case.eager("french"))
    assert not agree(found, case.eager("none"))
    again = inject(case.gm, load_adapter(file))
    with torch.no_grad():
        assert agree(pytree.tree_leaves(again(case.x)), case.eager("french"))


def test_it_is_verified_later_with_adapters_and_without(case: Required) -> None:
    french, legal = case.adapters["french"], case.adapters["legal"]
    assert french is not None
    assert legal is not None
    report = verify_onnx(case.gm, case.model, adapters=[french, legal])
    assert (report.verified, report.mode) == (True, "required")
    assert {row.what for row in report.checks} == {"base", "french", "legal"}
    assert verify_onnx(case.gm, case.model).verified
    files = [(None, case.file("none", ".safetensors")), (french, case.file("french", ENDINGS[1]))]
    assert all(row.ok for row in check_adapter_files(case.gm, case.model, files).checks)
    files[1] = french, case.file("legal", ENDINGS[1])
    with pytest.raises(VerificationError, match="disagree with eager"):
        check_adapter_files(case.gm, case.model, files)


def test_a_calibration_feeds_every_slot(case: Required) -> None:
    x = case.x.numpy()
    name = case.report.inputs[0]
    reader = CalibrationReader(case.model, [{name: x}], [case.file("french", ENDINGS[0])])
    slots = {v.name for v in onnx.load(case.model).graph.input}
    fed = [reader.get_next(), reader.get_next()]
    assert all(feeds is not None and feeds.keys() == slots for feeds in fed)
    assert reader.get_next() is None


def test_one_adapter_file_serves_the_file_with_defaults_too(exported: Any, tmp_path: Path) -> None:
    sample = exported.sample
    adapters = [sample.adapter(2), sample.adapter(3, 7)]
    gm, path = inject(sample.gm, adapters), tmp_path / "model.onnx"
    report = to_onnx(gm, path, adapters="required", external_data_above=0)
    assert {row.what for row in report.checks} == {"base", "rank2", "rank3", "adapted"}
    for place, adapter in enumerate(adapters):
        wanted, base = sample.eager(adapter), sample.eager()
        for ending, model in zip(ENDINGS, (path, exported.path("input")), strict=True):
            file = tmp_path / f"{place}{ending}"
            export_adapter(adapter, model, file)
            for other in (path, exported.path("input")):
                found = list(Session(other).run(sample.other, file).values())
                assert agree(found, wanted)
                assert not agree(found, base)
    merged = tmp_path / "merged.onnx"
    assert merge_onnx(path, adapters[0], merged).verified
    assert not merged.with_name("merged.onnx.data").exists()


@pytest.fixture(scope="module")
def mlp_required(exported_mlp: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlp") / "model.onnx"
    slots = {"up": "factors", "tail.1": "factors", "tail.1.weight": "weight"}
    to_onnx(exported_mlp.sample.gm, path, adapters="required", slots=slots)
    return path


def test_a_file_for_no_adapter_that_is_wrong_is_not_published(
    exported_mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fed where there is no adapter is held against eager as it will be fed."""
    right = adapter_file.every_value

    def wrong(*given: Any) -> Any:
        return {n: v + 0.1 if n.startswith("up.") else v for n, v in right(*given).items()}

    monkeypatch.setattr(adapter_file, "every_value", wrong)
    with pytest.raises(VerificationError, match="base"):
        to_onnx(exported_mlp.sample.gm, tmp_path / "m.onnx", adapters="required")
    assert list(tmp_path.iterdir()) == []


def test_what_an_adapter_leaves_alone_is_the_base(
    mlp_required: Path, exported_mlp: Any, tmp_path: Path
) -> None:
    sample, session = exported_mlp.sample, Session(mlp_required)
    part = Adapter("part", {"up": sample.adapter(2).updates["up"]})
    for ending in ENDINGS:
        file = tmp_path / f"part{ending}"
        export_adapter(part, mlp_required, file)
        found = list(session.run(sample.other, file).values())
        assert agree(found, sample.eager(part))
        assert not agree(found, sample.eager())
        assert list(load_adapter(file).updates) == ["up"]
        assert merge_onnx(mlp_required, file, tmp_path / f"{ending}.onnx").verified


def test_slots_of_another_exporters_file_without_defaults(
    exported_mlp: Any, tmp_path: Path
) -> None:
    sample, plain, path = exported_mlp.sample, tmp_path / "plain.onnx", tmp_path / "slots.onnx"
    to_onnx(sample.gm, plain)
    report = add_lora(plain, path, slots=["up", "tail.1"], adapters="required")
    assert (report.verified, report.mode) == (True, "required")
    assert report.inputs == ["x"]
    adapter = sample.adapter(2)
    for ending in ENDINGS:
        export_adapter(adapter, path, tmp_path / f"a{ending}")
        found = list(Session(path).run(sample.other, tmp_path / f"a{ending}").values())
        assert agree(found, sample.eager(adapter))
        assert not agree(found, sample.eager())
    assert agree(list(Session(path).run(sample.other).values()), sample.eager())
    with pytest.raises(ExportError, match="adapters='both': expected 'input' or 'required'"):
        add_lora(plain, tmp_path / "x.onnx", adapters="both")


def changed(path: Path, out: Path, change: Any) -> Path:
    """A file by another hand: without digests, which that would write as it likes."""
    model = onnx.load(path)
    entries = {entry.key: entry.value for entry in model.metadata_props if entry.key != DIGESTS}
    manifest = json.loads(entries[KEY])
    change(model.graph, manifest)
    entries[KEY] = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    del model.metadata_props[:]
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(out))
    return out


def widened(graph: Any, manifest: Any) -> None:
    manifest["slots"][0]["in_features"] = 1 << 30
    sizes = next(v for v in graph.input if v.name == "up.lora_A").type.tensor_type.shape
    sizes.dim[0].dim_value = 1 << 30


def given_a_default(graph: Any, manifest: Any) -> None:
    graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((3, 0), np.float32), "up.lora_A")
    )


def unlisted(graph: Any, manifest: Any) -> None:
    manifest["required"] = False


def said_twice(graph: Any, manifest: Any) -> None:
    manifest["required"] = "yes"


def narrower(graph: Any, manifest: Any) -> None:
    manifest["slots"][0]["in_features"] = 2


REFUSED = {
    "larger than any weight of the file": widened,
    r"or none without a default, for the slots up\.lora_A": given_a_default,
    "unknown or missing fields": unlisted,
    "unknown or missing field": said_twice,
    r"up\.lora_A is of \(2, None\), but \(3, 0\) in the graph": narrower,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_file_that_was_changed_is_refused(
    reason: str, mlp_required: Path, tmp_path: Path
) -> None:
    path = changed(mlp_required, tmp_path / "m.onnx", REFUSED[reason])
    with pytest.raises(ExportError, match=reason):
        Session(path)


def test_a_file_that_lost_its_defaults_is_refused(exported_mlp: Any, tmp_path: Path) -> None:
    def without(graph: Any, manifest: Any) -> None:
        kept = [t for t in graph.initializer if ".lora_" not in t.name]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    path = changed(exported_mlp.path("input"), tmp_path / "m.onnx", without)
    with pytest.raises(ExportError, match=r"or none with a default, for the slots up\.lora_A"):
        Session(path)


def test_slots_and_modes_are_told_from_others(exported_mlp: Any, tmp_path: Path) -> None:
    gm = exported_mlp.sample.gm
    with pytest.raises(ExportError, match="expected 'constant', 'input' or 'required'"):
        to_onnx(gm, tmp_path / "m.onnx", adapters="fed")
    with pytest.raises(ExportError, match='needs adapters="input" or "required"'):
        to_onnx(gm, tmp_path / "m.onnx", slots=["up"])
    assert list(tmp_path.iterdir()) == []
