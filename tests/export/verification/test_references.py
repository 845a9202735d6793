"""A file is held against the module with its adapters, and a lost update is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

from lora_fx import Adapter, AdapterWarning, Update, fold, inject, trace
from lora_fx.errors import VerificationError
from lora_fx.export import export_adapter, to_onnx, verify_onnx
from lora_fx.export.verification.references import reference, swapped
from lora_fx.export.verification.verify_onnx import check_adapter_files
from lora_fx.graph.example import forget_model
from lora_fx.reference.reference_run import WeightForm

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return y


def update(into: int, out: int) -> Update:
    make = torch.Generator().manual_seed(10 * into + out)
    down, up = (torch.randn(*size, generator=make) * 0.5 for size in ((2, into), (out, 2)))
    return Update(down, up, 1.5)


ADAPTER = Adapter("a", {"up": update(3, 5), "down": update(5, 4)})


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Net().eval(), (X,), dynamic_shapes=({0: "batch"},))


@pytest.fixture(scope="module")
def files(gm: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reports of the three forms, exported once."""
    directory, injected = tmp_path_factory.mktemp("files"), inject(gm, ADAPTER)
    return {
        "merged": to_onnx(fold(injected), directory / "merged.onnx"),
        "unmerged": to_onnx(injected, directory / "unmerged.onnx"),
        "swappable": to_onnx(injected, directory / "swappable.onnx", adapters="input"),
    }


@pytest.mark.parametrize("form", ["merged", "unmerged", "swappable"])
def test_the_report_says_what_of_an_adapter_was_used(form: str, files: dict[str, Any]) -> None:
    report = files[form]
    assert report.verified
    (coverage,) = report.coverage
    assert (coverage.adapter, coverage.tensors, coverage.used, coverage.layers) == ("a", 4, 4, 2)
    assert coverage.off > 1e-2
    assert report.to_dict()["coverage"][0]["used"] == 4
    name = "a: " if form == "swappable" else ""
    line = f"coverage {name}4 of 4 adapter tensors, 2 layers changed, output off the base by "
    assert line in str(report)
    assert not [note for note in report.notes if "graph itself" in note]


def losing(gm: fx.GraphModule, place: int) -> fx.GraphModule:
    """A pass of the user's own that loses one branch."""
    adds = [node for node in gm.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    adds[place].replace_all_uses_with(adds[place].args[0])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


@pytest.mark.parametrize(("place", "path"), [(0, "up"), (1, "down")])
@pytest.mark.parametrize("then", [lambda gm: gm, fold])
def test_a_branch_that_a_pass_has_lost_is_missed_and_named(
    gm: fx.GraphModule, place: int, path: str, then: Callable[..., Any], tmp_path: Path
) -> None:
    lost = then(losing(inject(gm, ADAPTER), place))
    with pytest.raises(VerificationError, match=f"without the update of {path}: it was lost"):
        to_onnx(lost, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_both_branches_lost_are_the_base(gm: fx.GraphModule, tmp_path: Path) -> None:
    lost = losing(losing(inject(gm, ADAPTER), 1), 0)
    with pytest.raises(VerificationError, match="agrees with the base: no update acts in it"):
        to_onnx(lost, tmp_path / "model.onnx")


def test_a_weight_that_was_changed_after_the_fold_is_told(tmp_path: Path) -> None:
    merged = fold(inject(trace(Net().eval(), (X,)), ADAPTER))
    merged.load_state_dict({name: 2 * value for name, value in merged.state_dict().items()})
    with pytest.raises(VerificationError, match=r"agrees with the graph.*load_state_dict\), fold"):
        to_onnx(merged, tmp_path / "model.onnx")


def test_a_file_that_lacks_a_part_is_refused_and_the_right_one_accepted(
    gm: fx.GraphModule, files: dict[str, Any], tmp_path: Path
) -> None:
    right = verify_onnx(gm, files["merged"].path, adapters=[ADAPTER])
    assert right.verified
    assert [row.tensors for row in right.coverage] == [4]
    part = Adapter("a", {"up": ADAPTER.updates["up"]})
    to_onnx(fold(inject(gm, part)), tmp_path / "part.onnx")
    with pytest.raises(VerificationError, match="without the update of down: it was lost"):
        verify_onnx(gm, tmp_path / "part.onnx", adapters=[ADAPTER])
    proto = onnx.load(files["unmerged"].path)
    factor = next(t for t in proto.graph.initializer if "lora_shrink" in t.name)
    factor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(factor) * 0, factor.name))
    onnx.helper.set_model_props(proto, {})  # as a file of somebody else, without digests
    onnx.save(proto, tmp_path / "zeroed.onnx")
    with pytest.raises(VerificationError, match="without the update of up: it was lost"):
        verify_onnx(gm, tmp_path / "zeroed.onnx", adapters=[ADAPTER])


def test_an_adapter_file_that_lacks_a_part_is_refused(
    gm: fx.GraphModule, files: dict[str, Any], tmp_path: Path
) -> None:
    model = Path(files["swappable"].path)
    for name, updates in (("whole", ADAPTER.updates), ("part", {"up": ADAPTER.updates["up"]})):
        export_adapter(Adapter("a", updates), model, tmp_path / name)
    check_adapter_files(gm, model, [(ADAPTER, tmp_path / "whole")])
    with pytest.raises(VerificationError, match="without the update of down: it was lost"):
        check_adapter_files(gm, model, [(ADAPTER, tmp_path / "part")])


def test_a_graph_that_remembers_no_module_is_its_own_reference(
    gm: fx.GraphModule, tmp_path: Path
) -> None:
    injected = inject(gm, ADAPTER)
    assert isinstance(reference("model", injected).eager, WeightForm)
    forget_model(injected)
    assert isinstance(reference("model", injected).eager, fx.GraphModule)
    report = to_onnx(injected, tmp_path / "model.onnx")
    assert report.verified
    assert any("held against the graph itself" in note for note in report.notes)


def test_each_adapter_of_a_graph_is_tried_alone(gm: fx.GraphModule) -> None:
    second = Adapter("b", {"up": update(3, 5)}, {"down.bias": torch.randn(4)})
    found = {adapter.name: adapter for adapter, _ in swapped(inject(gm, [ADAPTER, second]))}
    assert list(found) == ["a", "b"]
    assert list(found["b"].updates) == ["up"]
    assert list(found["b"].replacements) == ["down.bias"]
    assert found["a"].replacements == {}


def test_a_graph_with_other_outputs_is_not_the_module(gm: fx.GraphModule, tmp_path: Path) -> None:
    changed = inject(gm, ADAPTER)
    node = changed.graph.output_node()
    node.args = ([*node.args[0], *node.args[0]],) if isinstance(node.args[0], list) else node.args
    changed = trace(Pair(changed), (X,))
    changed.meta["lora_fx.example"] = gm.meta["lora_fx.example"]
    with pytest.raises(VerificationError, match=r"returns 1 tensors, the file has 2 outputs"):
        to_onnx(changed, tmp_path / "model.onnx")


class Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.inner(x)
        return y, torch.sin(y)


def test_an_adapter_without_effect_is_covered_and_said(gm: fx.GraphModule, tmp_path: Path) -> None:
    idle = Adapter("a", {"up": Update(torch.randn(2, 3), torch.zeros(5, 2), 1.0)})
    with pytest.warns(AdapterWarning, match="change no output"):
        report = to_onnx(inject(gm, idle), tmp_path / "model.onnx")
    assert str(report.coverage[0]).startswith("2 of 2 adapter tensors, 0 layers changed")
    assert report.coverage[0].off == 0
