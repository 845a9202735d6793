"""Files without defaults, fed by onnxruntime-node and onnxruntime-web, against eager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx import Adapter, export_adapter, inject, to_onnx, trace
from lora_fx.export import merge_onnx
from lora_fx.export.slots.choose import chosen_slots
from lora_fx.export.slots.probe import probe
from lora_fx.numerics import TOLERANCE
from lora_fx.testing import Experts, Ragged, Tied, relative, tiny
from tests.web.conftest import run

Inputs = dict[str, torch.Tensor]
INVOKED = (7, 3)


@dataclass(frozen=True)
class Case:
    """A model, and what of it is open.

    Attributes:
        model: in eval mode.
        inputs: it is traced with, and runs with.
        other: inputs of another shape.
        slots: as `to_onnx` takes them.
        vectors: likewise.
        tokens: from which on one of its adapters acts.
    """

    model: nn.Module
    inputs: Inputs
    other: Inputs
    slots: Any = "all-linear"
    vectors: bool = False
    tokens: tuple[int, ...] = ()


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def ids(*sizes: int) -> Inputs:
    made = torch.randint(8, 97, sizes, generator=torch.Generator().manual_seed(1))
    made[:, 2:4] = torch.tensor(INVOKED)
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    rows, images = {"x": random(4, 6, 3)}, {"input": random(2, 4, 8)}
    images_2d = {"input": random(2, 4, 6, 5)}
    decoder = tiny("LlamaForCausalLM").eval()
    invoked: dict[str, str] = {"model.layers.*": "factors", "input_ids": "invocation"}
    return {
        "encoder": Case(tiny("BertModel").eval(), ids(2, 7), ids(4, 11)),
        "vectors": Case(Ragged().eval(), rows, {"x": random(5, 2, 3)}, vectors=True),
        "whole tensors": Case(
            Ragged().eval(), rows, {"x": random(5, 2, 3)},
            {"wide": "weight", "wide.bias": "weight", "narrow": "factors"},
        ),
        "convolutions": Case(
            chain(nn.Conv1d(4, 6, 3, bias=False), nn.ReLU(), nn.ConvTranspose1d(6, 5, 3)),
            images, {"input": random(3, 4, 8)}, ["0", "2"], True,
        ),
        "groups": Case(
            chain(nn.Conv2d(4, 6, 3, groups=2)), images_2d, {"input": random(1, 4, 6, 5)}, ["0"],
        ),
        "a table that is the head": Case(
            Tied().eval(), {"ids": torch.tensor([[5, 1, 3], [0, 2, 5]])},
            {"ids": torch.tensor([[4, 4, 1]])}, ["table"],
        ),
        "experts": Case(
            Experts().eval(), {"x": random(2, 3, 4)}, {"x": random(1, 3, 4)}, ["up_proj"]
        ),
        "half": Case(
            Ragged().half().eval(), {"x": random(4, 6, 3).half()}, {"x": random(5, 2, 3).half()}
        ),
        "an invocation": Case(decoder, ids(2, 6), ids(1, 9), invoked, tokens=INVOKED),
    }  # fmt: skip


def dynamic(case: Case) -> dict[str, Any]:
    """The axes that differ between the inputs of a case."""
    pairs = {n: zip(v.shape, case.other[n].shape, strict=True) for n, v in case.inputs.items()}
    return {n: {i: f"d{i}" for i, (a, b) in enumerate(p) if a != b} for n, p in pairs.items()}


@dataclass
class Made:
    """The files of a case, and what each run of them should give."""

    files: Path
    jobs: list[dict[str, Any]]
    expected: list[list[torch.Tensor]]
    dtype: torch.dtype


def made(case: Case, home: Path) -> Made:
    """A model without defaults, two adapters and none by turns; and one that is merged."""
    gm = trace(case.model, (), case.inputs, dynamic_shapes=dynamic(case))
    slots = case.slots
    model, merged = home / "model.onnx", home / "merged.onnx"
    given = {"slots": slots, "vectors": case.vectors, "verify": False}  # it is, here
    to_onnx(gm, model, adapters="required", **given)
    own = chosen_slots(gm, slots, case.vectors)
    adapters = {name: named(probe(own, ranks, len(ranks), gm), name, case) for name, ranks in NAMES}
    for name, adapter in (("none", None), *adapters.items()):
        export_adapter(adapter, model, home / f"{name}.safetensors")
    turns: list[str | None] = ["none", "french", "legal", "none", "french"]
    runs = [(name, inputs) for inputs in (case.inputs, case.other) for name in turns]
    graphs = {name: inject(gm, adapter) for name, adapter in adapters.items()} | {"none": gm}
    jobs = [job(home, model.name, runs)]
    expected = [eager(graphs[str(name)], inputs) for name, inputs in runs]
    if not case.tokens:  # no weight says when an adapter acts
        french = home / "french.safetensors"
        merge_onnx(model, french, merged, allow_unmerged=True, verify=False)
        jobs.append(job(home, merged.name, [(None, case.inputs), (None, case.other)]))
        expected += [eager(graphs["french"], inputs) for inputs in (case.inputs, case.other)]
    first = next(p for p in case.model.parameters())
    return Made(home, jobs, expected, first.dtype)


NAMES = (("french", (2, 3)), ("legal", (1, 4, 2)))


def named(adapter: Adapter, name: str, case: Case) -> Adapter:
    """One of two adapters; the first acts from the start on."""
    updates: Any = adapter.updates
    if case.tokens:
        tokens = case.tokens if name == "legal" else ()
        updates = {path: replace(update, invocation=tokens) for path, update in updates.items()}
    return replace(adapter, name=name, updates=updates)


def job(home: Path, model: str, runs: Sequence[tuple[str | None, Inputs]]) -> dict[str, Any]:
    given = [
        {
            "inputs": {name: plain(value) for name, value in inputs.items()},
            "adapter": name and f"{home}/{name}.safetensors",
        }
        for name, inputs in runs
    ]
    return {"model": f"{home}/{model}", "runs": given}


def plain(value: torch.Tensor) -> dict[str, Any]:
    types = {torch.float32: "float32", torch.float16: "float16", torch.int64: "int64"}
    bits = value.view(torch.int16).int() & 0xFFFF if value.dtype is torch.float16 else value
    return {"type": types[value.dtype], "dims": list(value.shape), "data": bits.flatten().tolist()}


@torch.no_grad()
def eager(gm: Any, inputs: Inputs) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(gm(**inputs)) if value is not None]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    home = tmp_path_factory.mktemp("cases")
    found = {}
    for name, case in cases().items():
        (home / name).mkdir()
        found[name] = made(case, home / name)
    return found


@pytest.fixture(scope="module")
def in_node(everything: dict[str, Made]) -> dict[str, Any]:
    return by_case(everything, run("in_node.mjs", jobs=every_job(everything)))


@pytest.fixture(scope="module")
def in_browser(
    everything: dict[str, Made], served: tuple[Path, str], tmp_path_factory: Any
) -> dict[str, Any]:
    site, address = served
    home = next(iter(everything.values())).files.parent
    (site / "cases").symlink_to(home)
    jobs: Any = [
        {"model": moved(job["model"], home), "runs": [
            {**one, "adapter": one["adapter"] and moved(one["adapter"], home)}
            for one in job["runs"]
        ]}
        for job in every_job(everything)
    ]  # fmt: skip
    profile = str(tmp_path_factory.mktemp("profile"))
    found = run("in_browser.mjs", url=f"{address}/empty.html", profile=profile, jobs=jobs)
    return by_case(everything, found["found"])


def moved(path: str, home: Path) -> str:
    return path.replace(str(home), "/cases")


def every_job(everything: Mapping[str, Made]) -> list[dict[str, Any]]:
    return [job for made in everything.values() for job in made.jobs]


def by_case(everything: Mapping[str, Made], found: list[Any]) -> dict[str, Any]:
    rest = iter(found)
    return {name: [next(rest) for _ in made.expected] for name, made in everything.items()}


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("runtime", ["in_node", "in_browser"])
def test_merged_and_swapped_are_what_eager_computes(
    runtime: str, case: str, everything: dict[str, Made], request: pytest.FixtureRequest
) -> None:
    found, own = request.getfixturevalue(runtime)[case], everything[case]
    every: list[list[torch.Tensor]] = []
    for outputs, wanted in zip(found, own.expected, strict=True):
        assert isinstance(outputs, dict), outputs
        every.append([values(each, own.dtype) for each in outputs.values()])
        for value, want in zip(every[-1], wanted, strict=True):
            assert value.shape == want.shape
            assert relative(value, want) <= TOLERANCE[own.dtype]
    none, french, legal = every[:3]
    for one, other in ((french, none), (legal, none), (french, legal)):
        assert max(relative(a, b) for a, b in zip(one, other, strict=True)) > 1e-2


def values(output: list[Any], dtype: torch.dtype) -> torch.Tensor:
    dims, data, are_bits = output
    found = torch.tensor(data, dtype=torch.float64)
    found = found.int().short().view(torch.float16) if are_bits else found.to(dtype)
    return found.reshape(dims)


@pytest.fixture(scope="module")
def overridable(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A file whose slots have defaults, run alone and fed."""
    home, case = tmp_path_factory.mktemp("overridable"), cases()["vectors"]
    gm = trace(case.model, (), case.inputs)
    to_onnx(gm, home / "model.onnx", adapters="input")
    found = probe(chosen_slots(gm, None), (2,))
    export_adapter(found, home / "model.onnx", home / "french.safetensors")
    return [job(home, "model.onnx", [(None, case.inputs), ("french", case.inputs)])]


def test_javascript_feeds_no_input_that_has_a_default(overridable: Any) -> None:
    """Why there are files without: as long as this is so."""
    alone, fed = run("in_node.mjs", jobs=overridable)
    assert isinstance(alone, dict)
    assert fed == alone  # without a word
