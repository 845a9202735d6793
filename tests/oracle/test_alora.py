"""aLoRA beside PEFT's eager model: before the last invocation the base, from it on the adapter."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_fx
from lora_fx import (
    Adapter,
    AdapterError,
    ExportError,
    adapter_from,
    fold,
    inject,
    load_adapter,
    save_adapter,
    trace,
)
from lora_fx.cli.inspect import as_text, describe
from lora_fx.explanation import unmerged
from lora_fx.export.verification.verify_onnx import check_adapter_files
from lora_fx.testing import relative, same_adapter, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

TARGETS = {"LlamaForCausalLM": ["q_proj", "down_proj"], "GPT2LMHeadModel": ["c_attn", "c_proj"]}
MODELS = list(TARGETS)
# Keys of the base's tokens meet those of the adapter's in a second block.
SIZES = {"LlamaForCausalLM": {"num_hidden_layers": 2}, "GPT2LMHeadModel": {"n_layer": 1}}
ONE, OTHER = [7, 3], [9, 4, 6]
# No invocation, one, two of them, two that overlap others', one at the end, half of one.
IDS = torch.tensor(
    [
        [5, 1, 2, 8, 4, 6, 8, 1],
        [5, 7, 3, 9, 4, 6, 8, 1],
        [7, 3, 1, 7, 3, 7, 1, 2],
        [9, 4, 6, 7, 3, 9, 4, 6],
        [1, 2, 3, 4, 5, 6, 7, 3],
        [1, 1, 1, 1, 1, 1, 1, 7],
    ]
)
BASE_ROWS = {"one": (0, 5), "other": (0, 2, 4, 5), "plain": ()}
STARTS = {"one": (8, 1, 3, 3, 6, 8), "other": (8, 3, 8, 5, 8, 8), "plain": (0,) * 6}
INVOCATIONS = {"one": ONE, "other": OTHER, "plain": None}


@functools.cache
def base(architecture: str) -> Any:
    torch.manual_seed(0)
    return tiny(architecture, **SIZES[architecture]).eval()


@functools.cache
def graph(architecture: str) -> Any:
    shapes: Any = {"input_ids": {0: "batch", 1: "sequence"}, "use_cache": None}
    example = {"input_ids": torch.full((2, 8), 11), "use_cache": False}
    return trace(base(architecture), (), example, dynamic_shapes=shapes)


class Saved:
    """An adapter that PEFT made, saved and runs."""

    def __init__(self, architecture: str, name: str, root: Path, **options: Any) -> None:
        config = peft.LoraConfig(
            r=2,
            lora_alpha=5,
            target_modules=TARGETS[architecture],
            task_type="CAUSAL_LM",
            alora_invocation_tokens=INVOCATIONS[name],
            **options,
        )
        self.model = peft.get_peft_model(copy.deepcopy(base(architecture)), config).eval()
        torch.manual_seed(len(name))
        for key, parameter in self.model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_()
        self.directory = root / name
        self.model.save_pretrained(str(self.directory))
        self.adapter = load_adapter(self.directory, base=base(architecture))

    @torch.no_grad()
    def of_peft(self, ids: torch.Tensor = IDS) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids).logits
        return logits


@torch.no_grad()
def logits(gm: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = gm(input_ids=ids, use_cache=False)["logits"]
    return found


@pytest.mark.parametrize("name", INVOCATIONS)
@pytest.mark.parametrize("architecture", MODELS)
def test_injected_it_is_peft_from_the_invocation_on_and_the_base_before(
    architecture: str, name: str, tmp_path: Path
) -> None:
    saved = Saved(architecture, name, tmp_path)
    injected = inject(graph(architecture), saved.adapter)
    wanted, own, found = saved.of_peft(), logits(graph(architecture)), logits(injected)
    assert relative(found, wanted) <= 1e-5
    for row, start in enumerate(STARTS[name]):
        assert torch.equal(found[row, :start], own[row, :start])
        assert start == 8 or relative(found[row, start:], own[row, start:]) > 1e-2
    plain = Adapter("always", {p: _always(u) for p, u in saved.adapter.updates.items()})
    assert name == "plain" or relative(logits(inject(graph(architecture), plain)), wanted) > 1e-2
    same_adapter(
        adapter_from(injected), adapter_from(inject(graph(architecture), adapter_from(injected)))
    )


def _always(update: Any) -> Any:
    from dataclasses import replace

    return replace(update, kind="lora", invocation=())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_matter(side: str, tmp_path: Path) -> None:
    saved = Saved("LlamaForCausalLM", "one", tmp_path)
    padding = torch.zeros(6, 3, dtype=torch.int64)
    ids = torch.cat([padding, IDS] if side == "left" else [IDS, padding], 1)
    injected = inject(graph("LlamaForCausalLM"), saved.adapter)
    assert relative(logits(injected, ids), saved.of_peft(ids)) <= 1e-5
    assert relative(logits(graph("LlamaForCausalLM"), ids), saved.of_peft(ids)) > 1e-2


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_what_is_saved_again_peft_runs_alike(options: dict[str, Any], tmp_path: Path) -> None:
    saved = Saved("LlamaForCausalLM", "one", tmp_path, **options)
    save_adapter(saved.adapter, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["alora_invocation_tokens"], config["task_type"]) == (ONE, "CAUSAL_LM")
    own = copy.deepcopy(base("LlamaForCausalLM"))
    model = peft.PeftModel.from_pretrained(own, str(tmp_path / "again")).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, saved.of_peft())
    same_adapter(load_adapter(tmp_path / "again", base=base("LlamaForCausalLM")), saved.adapter)
    assert (
        relative(logits(inject(graph("LlamaForCausalLM"), saved.adapter)), saved.of_peft()) <= 1e-5
    )


def test_it_says_what_it_is_and_is_not_merged(tmp_path: Path) -> None:
    saved = Saved("LlamaForCausalLM", "one", tmp_path)
    told = as_text(describe(saved.directory))
    assert "kind alora" in told
    assert "invocation 7, 3" in told
    folded = fold(inject(graph("LlamaForCausalLM"), saved.adapter))
    assert relative(logits(folded), saved.of_peft()) <= 1e-5
    reasons = unmerged(folded)
    assert len(reasons) == len(saved.adapter.updates)
    assert all("no one weight says it" in reason for reason in reasons.values())
    for form in ("kohya", "diffusers", "loralib"):
        with pytest.raises(AdapterError, match="invocation tokens"):
            save_adapter(saved.adapter, tmp_path / f"x_{form}.safetensors", format=form)
    with pytest.raises(AdapterError, match="kind 'alora' is no plain product"):
        lora_fx.combine([(saved.adapter, 1.0)])


def test_to_lora_keeps_when_it_acts(tmp_path: Path) -> None:
    saved = Saved("LlamaForCausalLM", "one", tmp_path)
    assert saved.adapter.to_lora(2).adapter.updates == saved.adapter.updates
    lower = saved.adapter.to_lora(1, base=base("LlamaForCausalLM"))
    assert {u.invocation for u in lower.adapter.updates.values()} == {tuple(ONE)}
    assert {layer.rank for layer in lower.layers.values()} == {1}


def test_beside_its_layers_in_a_file(tmp_path: Path) -> None:
    saved, path = Saved("GPT2LMHeadModel", "one", tmp_path), tmp_path / "model.onnx"
    report = lora_fx.to_onnx(inject(graph("GPT2LMHeadModel"), saved.adapter), path)
    assert (report.verified, report.mode) == (True, "unmerged")
    assert report.coverage is not None
    assert report.coverage[0].layers == len(saved.adapter.updates)
    session = lora_fx.Session(path, threads=1)
    for ids in (IDS, IDS[1:2, :2], IDS[:2, :1]):
        (found,) = session.run({"input_ids": ids}).values()
        assert relative(torch.from_numpy(found), saved.of_peft(ids)) <= 1e-5
    assert relative(logits(graph("GPT2LMHeadModel")), saved.of_peft()) > 1e-2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def saved(home: Path) -> dict[str, Saved]:
    return {name: Saved("LlamaForCausalLM", name, home) for name in INVOCATIONS}


@pytest.fixture(scope="module")
def model(home: Path, saved: dict[str, Saved]) -> Path:
    adapters = [one.adapter for one in saved.values()]
    slots = lora_fx.export.slots_for(graph("LlamaForCausalLM"), adapters)
    assert slots["input_ids"] == "invocation"
    lora_fx.to_onnx(graph("LlamaForCausalLM"), home / "m.onnx", adapters="input", slots=slots)
    return home / "m.onnx"


class TestSwapped:
    """One file for LoRA and aLoRA of several invocations."""

    @pytest.mark.parametrize("name", INVOCATIONS)
    def test_each_is_what_peft_computes(
        self, name: str, model: Path, saved: dict[str, Saved], tmp_path: Path
    ) -> None:
        file = tmp_path / "a.onnx_adapter"
        lora_fx.export_adapter(saved[name].adapter, model, file)
        session = lora_fx.Session(model, threads=1)
        for ids in (IDS, IDS[1:4, :5], IDS[:2, :1]):
            (found,) = session.run({"input_ids": ids}, adapter=file).values()
            assert relative(torch.from_numpy(found), saved[name].of_peft(ids)) <= 1e-5
        (alone,) = session.run({"input_ids": IDS}).values()
        assert relative(torch.from_numpy(alone), saved[name].of_peft()) > 1e-2
        (found,) = session.run({"input_ids": IDS}, adapter=file).values()
        for row in BASE_ROWS[name]:
            assert relative(torch.from_numpy(found[row]), torch.from_numpy(alone[row])) <= 1e-6
        again = load_adapter(file)
        assert {u.invocation for u in again.updates.values()} == {tuple(INVOCATIONS[name] or ())}

    def test_the_file_is_verified_where_they_act(
        self, model: Path, saved: dict[str, Saved]
    ) -> None:
        adapters = [Adapter(name, one.adapter.updates) for name, one in saved.items()]
        report = lora_fx.export.verify_onnx(graph("LlamaForCausalLM"), model, adapters=adapters)
        assert report.verified
        assert all(one.off is not None and one.off > 1e-2 for one in report.coverage)

    def test_a_file_that_was_just_made_is_tried_where_it_acts(
        self, model: Path, saved: dict[str, Saved], tmp_path: Path
    ) -> None:
        file = tmp_path / "a.onnx_adapter"
        lora_fx.export_adapter(saved["one"].adapter, model, file)
        pairs = [(saved["one"].adapter, file)]
        evidence = check_adapter_files(graph("LlamaForCausalLM"), model, pairs)
        assert all(control.ok for control in evidence.controls)
        assert evidence.controls
        assert evidence.coverage[0].off is not None
        assert evidence.coverage[0].off > 1e-2

    def test_without_a_slot_for_its_tokens_it_is_refused(
        self, home: Path, saved: dict[str, Saved], tmp_path: Path
    ) -> None:
        from lora_fx.export.slots.choose import chosen_slots
        from lora_fx.export.slots.manifest import manifest_of
        from lora_fx.export.slots.slot_values import check_slots_serve

        gm = graph("LlamaForCausalLM")
        manifest = manifest_of(gm, chosen_slots(gm, "all-linear"))
        held: Any = type("Base", (), {"holds": lambda *_: False})()
        check_slots_serve(saved["plain"].adapter, manifest, home, held)
        with pytest.raises(AdapterError, match=r'slots=\{\.\.\., "input_ids": "invocation"\}'):
            check_slots_serve(saved["one"].adapter, manifest, home, held)

    def test_examples_without_room_are_refused(
        self, saved: dict[str, Saved], tmp_path: Path
    ) -> None:
        example = {"input_ids": torch.tensor([[1, 2, 3]]), "use_cache": False}
        gm = trace(base("LlamaForCausalLM"), (), example)
        with pytest.raises(ExportError, match="no room for the invocation"):
            lora_fx.to_onnx(inject(gm, saved["other"].adapter), tmp_path / "m.onnx")


def damaged(root: Path, **changes: Any) -> Path:
    directory = Saved("LlamaForCausalLM", "one", root).directory
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


@pytest.mark.parametrize("tokens", ["7, 3", [7.5], [-1], [True], {"7": 3}], ids=str)
def test_tokens_that_are_none_are_refused(tokens: Any, tmp_path: Path) -> None:
    directory = damaged(tmp_path, alora_invocation_tokens=tokens)
    with pytest.raises(
        AdapterError, match=r"alora_invocation_tokens is .*, expected a list of tok"
    ):
        load_adapter(directory)


@pytest.mark.parametrize("tokens", [None, []], ids=str)
def test_of_no_tokens_it_is_lora(tokens: Any, tmp_path: Path) -> None:
    adapter = load_adapter(damaged(tmp_path, alora_invocation_tokens=tokens))
    assert {(u.kind, u.invocation) for u in adapter.updates.values()} == {("lora", ())}
