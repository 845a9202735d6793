"""Which of PEFT's types an adapter is written as, with which config, and what none holds."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_fx import Adapter, AdapterError, Update
from lora_fx.adapters.other_updates import AnyUpdate, Scaling, WeightUpdate, added
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.write import choose, contents
from lora_fx.kinds import KINDS
from lora_fx.testing import Two, config_in, means, relative, save_peft_case, update_of


def low(out: int = 5, into: int = 3, rank: int = 2, scale: float = 1.5, **fields: Any) -> Update:
    return Update(torch.randn(rank, into), torch.randn(out, rank), scale, **fields)


def table(**fields: Any) -> Update:
    return low(6, 11, stored=EMBEDDING, **fields)


def parameter(**fields: Any) -> Update:
    return low(stored=SourceRecord({}, {"parameter": "w", "depth": 0}), **fields)


def tokens(*indices: int, **settings: Any) -> AnyUpdate:
    rows = {"trainable_tokens_delta": torch.randn(len(indices), 6)}
    return KINDS["tokens"].read(rows, {"indices": list(indices), **settings})


def ia3(feedforward: bool = False) -> AnyUpdate:
    return update_of("ia3_in" if feedforward else "ia3", (5, 3))


def oft(**settings: Any) -> AnyUpdate:
    return KINDS["oft"].read({"oft_R.weight": torch.randn(4, 1)}, settings)


def lokr_of_another_program() -> AnyUpdate:
    tensors = {"lokr_w1": torch.randn(5, 3), "lokr_w2": torch.randn(2, 1)}
    return KINDS["lokr"].read(tensors, {"scale": 0.75})


LOHA, ONES = update_of("loha", (7, 5)), torch.ones(5)
CHOSEN: dict[str, tuple[dict[str, AnyUpdate], str]] = {
    "lora": ({"p": low(), "q": low(kind="rslora")}, "LORA"),
    "dora": ({"p": low(magnitude=ONES, kind="dora")}, "LORA"),
    "a table": ({"p": table(), "q": low()}, "LORA"),
    "tokens": ({"p": tokens(1, 2)}, "TRAINABLE_TOKENS"),
    "tokens beside": ({"p": tokens(1, 2), "q": low()}, "LORA"),
    "loha": ({"p": LOHA, "q": LOHA}, "LOHA"),
    "ia3": ({"p": ia3()}, "IA3"),
    "plain ones": ({"p": LOHA, "q": low()}, "LORA"),
    "loha that lost its tensors": ({"p": low(kind="loha")}, "LORA"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_one_type_holds_all_layers(name: str) -> None:
    updates, expected = CHOSEN[name]
    chosen = choose(Adapter("a", updates))
    assert chosen.type.peft_type == expected
    assert chosen.layers.keys() | chosen.tokens.keys() == updates.keys()


DENSE = WeightUpdate("full", added(torch.ones(5, 3)), (5, 3))
LONG = "layers.0." + "x" * 30
REFUSED: list[tuple[dict[str, AnyUpdate], str]] = [
    ({"p": ia3(), "q": low()}, "ia3: p; lora: q"),
    ({"p": DENSE, "q": DENSE}, "no one type of PEFT holds full: p, q"),
    ({"p": low(row=ONES)}, "no one type of PEFT holds lora: p"),
    ({"p": Scaling(row=ONES)}, "holds ia3: p"),
    ({"p": lokr_of_another_program()}, "no one type of PEFT holds lokr: p"),
    ({"p": ia3(), "q": tokens(1)}, r"no trained tokens \(q\) beside IA3"),
    ({"p": low(), "q": low(magnitude=ONES)}, "these have no magnitude: p"),
    ({"p": low(magnitude=ONES, bias=ONES)}, "no lora_bias beside DoRA: p"),
    ({"p": low(bias=ONES), "q": table()}, "of embeddings: q"),
    ({"p": low(magnitude=ONES), "q.w": parameter(magnitude=ONES)},
     "no DoRA or lora_bias of parameters: q.w"),
    ({"p": low(rank=0)}, "rank 0, which PEFT does not load: p"),
    ({"a.base_layer.p": low()}, "for itself: a.base_layer.p"),
    ({"p": oft(), "q": oft(num_cayley_neumann_terms=3)},
     r"one num_cayley_neumann_terms .* 5 at p; 3 at q"),
    *[
        ({"mha": low(6, 6), "mha.out_proj": other}, r"these differ: mha\.out_proj")
        for other in (low(6, 6, 3), low(6, 6, 2, 1.0))
    ],
    ({**{LONG.replace("0", str(n)): ia3(True) for n in range(12)}, f"m.{LONG}": ia3()},
     r"feedforward_modules would mean m\.layers\.0\.x"),
]  # fmt: skip


@pytest.mark.parametrize(("updates", "message"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_no_type_holds_is_refused_by_name(
    updates: dict[str, AnyUpdate], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        save_adapter(Adapter("a", updates), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def written(updates: dict[str, AnyUpdate], path: Path, **fields: Any) -> dict[str, Any]:
    save_adapter(Adapter("a", updates, **fields), path)
    return config_in(path)


def test_mixed_plain_kinds_become_lora_of_their_rank(lab: Any) -> None:
    updates = {"fc": low(), "layers.0": LOHA}
    written(updates, lab.root / "a")
    found = load_adapter(lab.root / "a").updates
    assert (found["fc"].kind, found["layers.0"].kind) == ("lora", "lora")
    model = lab.read("mlp", lab.root / "a").get_base_model()
    for path, update in updates.items():
        layer = model.get_submodule(path)
        wanted = layer.get_delta_weight("default").detach()
        assert relative(update.delta(), wanted) <= 1e-6
        assert relative(1.1 * update.delta(), wanted) > 1e-2


def test_a_table_and_a_convolution_that_were_made_here_load_into_peft(tmp_path: Path) -> None:
    conv = Update(torch.randn(2, 4, 3), torch.randn(5, 2), 0.5)
    updates: dict[str, AnyUpdate] = {"0": table(), "1": conv}
    written(updates, tmp_path / "a")
    model = nn.Sequential(nn.Embedding(11, 6), nn.Conv1d(4, 5, 3))
    before = {"0": model[0].weight.detach().T.clone(), "1": model[1].weight.detach().clone()}
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload()
    after = {"0": merged[0].weight.detach().T, "1": merged[1].weight.detach()}
    for path, update in updates.items():
        means(update, before[path], after[path])


@pytest.mark.parametrize("name", ["lora", "loha", "qalora"])
def test_a_table_is_written_as_one_wherever_it_was_read(name: str, tmp_path: Path) -> None:
    """PEFT passes over a table's ``lora_A.weight``."""
    model = Two(nn.Embedding(11, 6), nn.Linear(6, 7))
    if name == "qalora":
        made = {"use_qalora": True, "qalora_group_size": 2, "target_modules": ["wide", "narrow"]}
        config = peft.LoraConfig(r=2, init_lora_weights=False, **made)
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "file")
    else:
        ends = TABLES_OF_LYCORIS[name]
        tensors = {f"lycoris_{end}": torch.randn(size) for end, size in ends.items()}
        save_file(tensors, tmp_path / "file")
    adapter = load_adapter(tmp_path / "file", base=model)
    save_adapter(adapter, tmp_path / "again")
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "again"))
    after = merged.merge_and_unload().wide.weight.detach().T
    means(adapter.updates["wide"], model.wide.weight.detach().T, after)


TABLES_OF_LYCORIS = {
    "lora": {"wide.lora_down.weight": (2, 11), "wide.lora_up.weight": (6, 2)},
    "loha": {  # beside another kind, so that both are LoRA of their ranks
        **{f"wide.hada_w{factor}_a": (6, 2) for factor in (1, 2)},
        **{f"wide.hada_w{factor}_b": (2, 11) for factor in (1, 2)},
        "narrow.lora_down.weight": (2, 6), "narrow.lora_up.weight": (7, 2),
    },
}  # fmt: skip


def test_what_peft_ties_itself_is_not_written() -> None:
    updates = {"e": tokens(1, 2), "head": tokens(1, 2, head=True, tied="e"), "fc": low()}
    assert set(choose(Adapter("a", updates)).tokens) == {"e"}


def test_a_stored_alpha_of_another_program_is_in_the_config_alone(tmp_path: Path) -> None:
    assert LOHA.stored is not None
    stored = replace(LOHA.stored, tensors={**LOHA.stored.tensors, "alpha": torch.tensor(1.5)})
    written({"fc": replace(LOHA, stored=stored)}, tmp_path / "a")
    found = load_adapter(tmp_path / "a").updates["fc"]
    assert found.stored is not None
    assert "alpha" not in found.stored.tensors
    assert torch.equal(found.delta(), LOHA.delta())


def test_a_bias_of_some_updates_is_zero_for_the_others(lab: Any, tmp_path: Path) -> None:
    bias = torch.randn(5)
    written({"fc": low(bias=bias), "layers.0": low(7, 5)}, tmp_path / "a")
    found: Any = load_adapter(tmp_path / "a").updates
    assert torch.equal(found["fc"].bias, bias)
    assert torch.equal(found["layers.0"].bias, torch.zeros(7))
    lab.read("mlp", tmp_path / "a")


def test_trained_and_tied_tensors_are_written(tmp_path: Path) -> None:
    down, up = nn.Parameter(torch.randn(2, 3)), torch.randn(2, 5).T
    tied = Update(down, up, 1.0)
    written({"p": tied, "q": tied}, tmp_path / "a")
    found = load_adapter(tmp_path / "a").updates
    assert torch.equal(found["p"].down, down.detach())
    assert torch.equal(found["q"].up, up)


def test_mixed_kinds_ranks_and_scales_become_patterns(lab: Any, tmp_path: Path) -> None:
    updates = {
        "fc": low(5, 3, 2, 1 / 3, kind="rslora"),
        "layers.0": low(7, 5, 3, 0.1),
        "layers.1": low(6, 7, 3, 0.1),
        "block.fc": low(9, 4, 1, 7.0),
    }
    config = written({**updates}, tmp_path / "a")
    assert (config["use_rslora"], config["r"]) == (False, 3)
    assert config["rank_pattern"] == {"^fc": 2, r"^block\.fc": 1}
    found = load_adapter(tmp_path / "a").updates
    model = lab.read("mlp", tmp_path / "a").get_base_model()
    for path, u in updates.items():
        assert math.isclose(found[path].scale, u.scale, rel_tol=2.3e-16)  # the last bit
        assert not math.isclose(found[path].scale, 0.9 * u.scale, rel_tol=2.3e-16)
        layer = model.get_submodule(path)
        assert layer.scaling["default"] == found[path].scale
        assert torch.equal(layer.lora_A["default"].weight, u.down)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("rank", range(1, 65))
def test_every_scale_comes_back_exactly(tmp_path: Path, rank: int, kind: str) -> None:
    divisor = rank if kind == "lora" else rank**0.5
    for index, alpha in enumerate((1, 16, 0.3, 3e-5)):
        update = low(5, 3, rank, alpha / divisor, kind=kind)
        config = written({"fc": update}, tmp_path / str(index))
        found = load_adapter(tmp_path / str(index)).updates["fc"]
        assert (found.scale, found.kind) == (update.scale, kind)
        assert alpha != 16 or config["lora_alpha"] == 16


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (TargetRule("a.*"), "a.*"),
        (TargetRule(["fc"]), ("fc",)),
        (TargetRule("all-linear"), ("a.fc",)),
        (TargetRule(["other"]), ("a.fc",)),
        (None, ("a.fc",)),
    ],
)
def test_the_rule_is_kept_unless_it_is_all_linear_or_contradicted(
    rule: TargetRule | None, expected: Any, tmp_path: Path
) -> None:
    written({"a.fc": low()}, tmp_path / "a", expects=rule)
    found = load_adapter(tmp_path / "a").expects
    assert found is not None
    assert found.target_modules == expected


def test_paths_at_the_root_become_a_regex_if_it_fits() -> None:
    def targets(*paths: str) -> object:
        return contents(Adapter("a", {path: low() for path in paths}))[0]["target_modules"]

    assert targets("fc", "b.fc") == r"b\.fc|fc"
    assert targets("a.fc", "b.fc") == ["a.fc", "b.fc"]
    assert targets("fc", "b" * 300) == ["b" * 300, "fc"]


@pytest.mark.parametrize(
    ("names", "saved", "bias"),
    [
        ([], None, "none"),
        (["fc.bias"], None, "lora_only"),
        (["fc.bias", "norm.bias"], None, "all"),
        (["head.weight", "head.bias"], ["head"], "none"),
        (["head.weight", "head.bias", "fc.bias"], ["head"], "lora_only"),
        (["head.scale", "head.fc.weight"], ["head"], "none"),
    ],
)
def test_whole_parameters_are_of_saved_modules_or_of_the_narrowest_bias_mode(
    names: list[str], saved: list[str] | None, bias: str, tmp_path: Path
) -> None:
    replaced = {name: torch.ones(5) for name in names}
    config = written({"fc": low()}, tmp_path / "a", replacements=replaced)
    assert (config["bias"], config["modules_to_save"]) == (bias, saved)
    assert set(load_adapter(tmp_path / "a").replacements) == set(names)


def test_what_the_layers_agree_on_is_in_the_config(tmp_path: Path) -> None:
    updates = {path: oft(num_cayley_neumann_terms=3) for path in "pq"}
    fields = written(updates, tmp_path / "a")
    assert (fields["num_cayley_neumann_terms"], fields["use_cayley_neumann"]) == (3, True)


def test_the_layers_scaled_at_their_input_are_meant_alone(tmp_path: Path) -> None:
    updates = {"fc": ia3(True), "block.fc": ia3(False), "proj": ia3(True)}
    assert written(updates, tmp_path / "a")["feedforward_modules"] == "fc|proj"
    found = load_adapter(tmp_path / "a").updates
    kept = {path: u.stored.settings["feedforward"] for path, u in found.items() if u.stored}
    assert kept == {"fc": True, "block.fc": False, "proj": True}
    paths = [LONG.replace("0", str(index)) for index in range(12)]  # more than a regex may hold
    fields = written(dict.fromkeys(paths, ia3(True)), tmp_path / "b")
    assert fields["feedforward_modules"] == sorted(paths)


def test_an_output_projection_has_the_rank_of_its_attention(tmp_path: Path) -> None:
    updates = {path: low(6, 6, bias=torch.randn(6)) for path in ("mha", "mha.out_proj")}
    fields = written(updates, tmp_path / "a")
    assert (fields["rank_pattern"], fields["target_modules"]) == ({}, "mha")
    found = load_adapter(tmp_path / "a").updates
    for path, update in updates.items():
        own, other = found[path].shift(lambda: None), update.shift(lambda: None)
        assert own is not None
        assert other is not None
        assert torch.allclose(own, other)
        assert torch.allclose(found[path].weight(torch.zeros(6, 6)), update.delta())


NAMES = ("linear loha patterns", "linear lokr patterns", "experts patterns", "attention rslora")


@pytest.mark.parametrize("name", NAMES)
def test_patterns_give_every_layer_its_rank_and_alpha(name: str, tmp_path: Path) -> None:
    case = save_peft_case(name, tmp_path / "by_peft")
    adapter = load_adapter(case.directory, base=case.base, name="a")
    save_adapter(replace(adapter, expects=None), tmp_path / "written")
    assert str(load_adapter(tmp_path / "written", base=case.base, name="a")) == str(adapter)
