"""Every type of PEFT without a kind of ours, read through PEFT: what PEFT's own model computes."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx

import lora_fx
from lora_fx import Adapter, fold, inject, load_adapter, text, trace
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.formats.hints import Hints
from lora_fx.layers.sites import sites
from lora_fx.numerics import TOLERANCE
from lora_fx.testing import PEFT_TYPES, SavedCase, make_adapter, relative, save_peft_case
from lora_fx.testing.peft_types import NOT_WEIGHTS
from lora_fx.traced_adapters import read_traced
from lora_fx.traced_adapters.config import parse
from lora_fx.traced_adapters.reasons import NOT_AFFINE, NOT_AFFINE_LORA

# What PEFT says of Conv1D, of its kernels, of what it saves, and of how it is configured.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


_HOME = tempfile.TemporaryDirectory()
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "KINDS.md"
MARK = "\n# Types of PEFT without a kind of ours\n"
TEXT = """
Written by `make matrix` (`tests/oracle/test_peft_types.py`, which holds it). With PEFT installed
and `base=` given, PEFT builds the layers of these types, and the analysis reads them. Each row is
an adapter of two layers that PEFT saved, with the options that the name says, read as two factors
or as an expression in W that makes the weight anew; "inject" and "fold" say how near the outputs
are to those of PEFT's own model. The base alone is off by more than 1e-2. What is of low rank goes
into a slot too.

| type | on | read as | inject | fold |
|---|---|---|---|---|
{rows}

LORA, ADALORA, VERA, LOHA, LOKR, IA3, OFT and TRAINABLE_TOKENS have kinds of their own, above. What
changes no weight is refused; trace and export the model that PEFT wraps instead:

{reasons}
"""


def graph(case: SavedCase) -> Any:
    return trace(case.base, (case.x,), dynamic_shapes=({0: "batch"},))


def of_peft(case: SavedCase) -> torch.Tensor:
    return case.run(case.directory)


@functools.cache
def read(name: str) -> tuple[SavedCase, Adapter, fx.GraphModule, torch.Tensor]:
    """A case, its adapter, the base's graph, and what PEFT computes; all are only read."""
    case = save_peft_case(name, Path(_HOME.name, name.replace("/", "_"), "french"))
    return case, load_adapter(case.directory, base=case.base), trace(case.base), of_peft(case)


def row_of(name: str) -> tuple[str, ...]:
    """What a case of the table is read as, and what injecting and folding it give beside PEFT."""
    case, adapter, gm, wanted = read(name)
    before = [parameter.clone() for parameter in case.base.parameters()]
    injected = inject(gm, adapter)
    folded = fold(injected)
    with torch.no_grad():
        errors = [relative(gm(case.x), wanted) for gm in (injected, folded)]
        assert relative(case.base(case.x), wanted) > 1e-2
    assert "lora_" not in text(folded)
    assert all(map(torch.equal, case.base.parameters(), before))
    words = {_word(update) for update in adapter.updates.values()} or {"replaced parameters"}
    return (" or ".join(sorted(words)), *(_bound(error) for error in errors))


def _word(update: AnyUpdate) -> str:
    return "low rank" if isinstance(update, Update) else "an expression in W"


def _bound(error: float) -> str:
    return next(f"to {bound:.0e}" for bound in (1e-6, 1e-5) if error <= bound)


def written(rows: Mapping[str, tuple[str, ...]]) -> str:
    """The part of the document that is about PEFT's types."""
    lines = [
        f"| {name.replace(', ', ' | ', 1)} | {' | '.join(row)} |" for name, row in rows.items()
    ]
    reasons = [f"- {name}: {NOT_AFFINE[name]}" for name in NOT_WEIGHTS]
    options = [
        f"- LORA with {name}: {why.removeprefix('which ')}" for name, why in NOT_AFFINE_LORA.items()
    ]
    return TEXT.format(rows="\n".join(lines), reasons="\n".join(reasons + options))


def documented() -> dict[str, tuple[str, ...]]:
    """The rows that the document holds."""
    lines = DOCUMENT.read_text().partition(MARK)[2].splitlines()
    cells = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    return {f"{kind}, {on}": tuple(rest) for kind, on, *rest in cells[1:]}


@pytest.mark.parametrize("name", PEFT_TYPES)
def test_a_type_injects_and_folds_to_what_peft_computes_as_documented(name: str) -> None:
    assert row_of(name) == documented()[name]


@pytest.mark.parametrize("name", PEFT_TYPES)
def test_with_all_the_energy_a_type_is_lora_to_rounding(name: str) -> None:
    case, adapter, gm, wanted = read(name)
    found = adapter.to_lora(energy=1.0, base=case.base)
    with torch.no_grad():
        assert relative(inject(gm, found.adapter)(case.x), wanted) <= 1e-5
        assert relative(case.base(case.x), wanted) > 1e-2
    assert all(isinstance(u, Update) and u.is_plain for u in found.adapter.updates.values())
    assert all(error <= 1e-6 for error in found.errors.values())


@pytest.mark.parametrize("name", PEFT_TYPES)
def test_calls_that_make_a_weight_anew_are_no_layers(name: str) -> None:
    _, adapter, gm, _ = read(name)
    before, now = ([site.layer for site in sites(graph)] for graph in (gm, inject(gm, adapter)))
    assert now == before


@pytest.mark.parametrize("name", ["road, linear", "randlora, ragged", "osf, ragged"])
def test_lora_stands_beside_a_weight_that_another_adapter_made_anew(name: str) -> None:
    case, adapter, gm, _ = read(name)
    shapes = {site.path: site.shape for site in sites(gm) if site.is_linear}
    one, lora = inject(gm, adapter), make_adapter(shapes, name="second")
    with torch.no_grad():
        wanted = inject(fold(one), lora)(case.x)
        assert relative(inject(one, lora)(case.x), wanted) <= 1e-5
        assert relative(one(case.x), wanted) > 1e-2


def test_the_document_has_every_type_and_no_other() -> None:
    assert list(documented()) == list(PEFT_TYPES)
    assert DOCUMENT.read_text().partition(MARK)[2] == written(documented())


@pytest.mark.parametrize("name", ["hira, ragged", "road, linear", "frod, Conv1D", "hra, conv2d"])
def test_another_adapter_of_the_same_type_computes_something_else(
    name: str, tmp_path: Path
) -> None:
    case, other = (save_peft_case(name, tmp_path / str(seed), seed) for seed in (3, 4))
    adapter = load_adapter(other.directory, base=case.base, name="other")
    with torch.no_grad():
        found = fold(inject(graph(case), adapter))(case.x)
    assert relative(found, of_peft(other)) <= 1e-5
    assert relative(found, of_peft(case)) > 1e-2


LOW_RANK = ["delora", "miss", "psoft", "pvera", "tinylora", "unilora", "vblora", "lora, qalora"]


@pytest.mark.parametrize("name", LOW_RANK)
def test_what_shows_its_factors_is_an_update_of_low_rank(name: str) -> None:
    _, adapter, _, _ = read(next(n for n in PEFT_TYPES if n.startswith(name)))
    updates = adapter.updates.values()
    assert all(isinstance(u, Update) and u.is_plain and u.rank <= 2 for u in updates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vblora, linear", "boft, linear", "hira, ragged", "miss, ragged"])
def test_a_base_of_half_precision_agrees_within_the_table(name: str, dtype: torch.dtype) -> None:
    case, _, _, _ = read(name)
    half = copy.deepcopy(case.base).to(dtype)
    gm = trace(half, (case.x.to(dtype),))
    wide = SavedCase(copy.deepcopy(half).float(), case.directory, case.x.to(dtype).float())
    wanted = of_peft(wide)
    folded = fold(inject(gm, load_adapter(case.directory, base=half)))
    with torch.no_grad():
        assert relative(folded(case.x.to(dtype)).float(), wanted) <= TOLERANCE[dtype]
        assert relative(half(case.x.to(dtype)).float(), wanted) > 5 * TOLERANCE[dtype]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a few types, merged and beside the layer."""
    made: dict[str, Path] = {}
    for name in ("boft, linear", "hira, embedding", "c3a, linear"):
        directory = tmp_path_factory.mktemp("exported")
        case, adapter, _, _ = read(name)
        injected = inject(graph(case), adapter)
        for mode, gm in (("merged", fold(injected)), ("unmerged", injected)):
            path = directory / f"{mode}.onnx"
            assert lora_fx.to_onnx(gm, path).verified
            made[f"{name} {mode}"] = path
    return made


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.parametrize("name", ["boft, linear", "hira, embedding", "c3a, linear"])
def test_a_file_of_it_runs_in_onnxruntime(name: str, mode: str, exported: dict[str, Path]) -> None:
    path, (case, _, _, wanted) = exported[f"{name} {mode}"], read(name)
    session = lora_fx.Session(path, threads=1)
    (found,) = session.run({"x": case.x}).values()
    assert relative(torch.from_numpy(found), wanted) <= 1e-5
    assert relative(case.base(case.x).detach(), wanted) > 1e-2


def test_one_of_low_rank_goes_into_a_slot(tmp_path: Path) -> None:
    case, adapter, _, wanted = read("vblora, linear")
    gm = graph(case)
    lora_fx.to_onnx(gm, tmp_path / "m.onnx", adapters="input")
    lora_fx.export_adapter(adapter, tmp_path / "m.onnx", tmp_path / "french.onnx_adapter")
    session = lora_fx.Session(tmp_path / "m.onnx", threads=1)
    (found,) = session.run({"x": case.x}, adapter=tmp_path / "french.onnx_adapter").values()
    assert relative(torch.from_numpy(found), wanted) <= 1e-5
    lora_fx.save_adapter(adapter, tmp_path / "as_lora")
    again = inject(gm, load_adapter(tmp_path / "as_lora"))
    assert relative(again(case.x).detach(), wanted) <= 1e-5


# A kind of ours is read without PEFT and without the base, and means the same.
OURS = [
    *("linear lora", "linear dora", "linear loha patterns", "linear lokr", "linear vera"),
    *("linear ia3", "linear oft", "linear adalora", "embedding oft", "conv2d loha"),
    *("transposed dora", "conv1d lokr", "linear bias"),
]


@pytest.mark.parametrize("name", OURS)
def test_a_kind_of_ours_means_what_the_mechanism_reads(name: str, tmp_path: Path) -> None:
    case = save_peft_case(name, tmp_path / "a")
    fields = json.loads((case.directory / "adapter_config.json").read_text())
    weights = case.directory / "adapter_model.safetensors"
    hints = Hints(base=case.base)
    config = parse(fields, "here", strict=True)
    traced = read_traced("b", weights, load_file(weights), config, case.directory, hints)
    ours = load_adapter(case.directory, base=case.base)
    gm = trace(case.base)
    with torch.no_grad():
        outputs = [fold(inject(gm, adapter))(case.x) for adapter in (traced, ours)]
        assert relative(*outputs) <= 1e-5
        assert relative(case.base(case.x), outputs[0]) > 1e-2
    assert traced.updates.keys() == ours.updates.keys()


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_changes_no_weight_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": name, "target_modules": ["wide"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    reason = rf"peft_type is '{name}', which \w+ .*; trace and export the model that PEFT wraps"
    with pytest.raises(lora_fx.AdapterError, match=reason):
        load_adapter(tmp_path)


def test_every_type_of_peft_is_a_case_or_has_a_reason() -> None:
    ours = {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "TRAINABLE_TOKENS"}
    through = {name.partition(",")[0].upper() for name in PEFT_TYPES}
    assert {kind.value for kind in peft.PeftType} == ours | through | set(NOT_WEIGHTS)


def main() -> None:
    """Measures every type and writes its part of the document."""
    torch.set_num_threads(1)
    rows = {name: row_of(name) for name in PEFT_TYPES}
    DOCUMENT.write_text(DOCUMENT.read_text().partition(MARK)[0] + MARK + written(rows))


if __name__ == "__main__":
    main()
