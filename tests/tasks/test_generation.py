"""Decoders with a cache: ten architectures, merged and swapped, against PEFT's own generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from torch import nn

from lora_fx import (
    Adapter,
    ExportError,
    ExportReport,
    LoraFxError,
    Session,
    export_adapter,
    fold,
    inject,
    load_adapter,
    to_onnx,
)
from lora_fx.cli.commands import export_model, verify_model
from lora_fx.cli.loaded import load
from lora_fx.cli.model_source import find_model
from lora_fx.export import merge_onnx, quantize_onnx
from lora_fx.export.runtime.in_place import AXES, OPERATOR, writes_in_place
from lora_fx.export.spelling.attention import FuseAttention
from lora_fx.testing import make_adapter

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 97, "max_position_embeddings": 96, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"num_hidden_layers": 2, "sliding_window": 8, "head_dim": 8, **GROUPED}
DECODERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {"head_dim": 8, **GROUPED},
    "MistralForCausalLM": WINDOW | {"num_hidden_layers": 1},  # all its layers have a window
    "Phi3ForCausalLM": GROUPED,
    "Gemma2ForCausalLM": WINDOW | {"tie_word_embeddings": False},
    "GPT2LMHeadModel": {"n_inner": 48},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoXForCausalLM": {},
    "Olmo2ForCausalLM": {},
}
MAKE = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 97, (2, 12), generator=MAKE)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def decoder(name: str, **changes: Any) -> Any:
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES | DECODERS.get(name, {}) | changes)).eval()
    for parameter in model.parameters():  # transformers' own are so small that tokens repeat
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@dataclass(frozen=True)
class Owner:
    """PEFT's own model, base and adapters in one directory."""

    name: str
    home: Path

    @cached_property
    def model(self) -> Any:
        base = decoder(self.name)
        base.save_pretrained(self.home / "base")
        tuned: Any = None
        for place, adapter in enumerate(("french", "legal")):
            torch.manual_seed(place + 1)
            config = peft.LoraConfig(
                r=4 + place, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM",
                init_lora_weights=False, fan_in_fan_out=self.name == "GPT2LMHeadModel",
            )  # fmt: skip
            if tuned is None:
                tuned = peft.get_peft_model(base, config, adapter)
            else:
                tuned.add_adapter(adapter, config)
        tuned.save_pretrained(self.home / "adapters")
        return tuned.eval()

    def tokens(self, adapter: str | None) -> torch.Tensor:
        given: Any = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 32}
        given |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if adapter is None:
            with self.model.disable_adapter():
                found: torch.Tensor = self.model.generate(**given)
                return found
        self.model.set_adapter(adapter)
        found = self.model.generate(**given)
        return found

    @cached_property
    def adapters(self) -> list[Adapter]:
        assert self.model is not None
        return [load_adapter(self.home / "adapters" / name) for name in ("french", "legal")]

    def export(self, file: str, gm: Any, **given: Any) -> tuple[ExportReport, Session]:
        report = to_onnx(gm, self.home / file, **given)
        return report, Session(self.home / file, threads=1)


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_are_those_of_peft_merged_and_swapped(name: str, tmp_path: Path) -> None:
    owner = Owner(name, tmp_path)
    wanted = {adapter: owner.tokens(adapter) for adapter in (None, "french", "legal")}
    assert len({tuple(tokens.flatten().tolist()) for tokens in wanted.values()}) == 3
    gm = find_model(str(tmp_path / "base")).traced()
    both = inject(gm, owner.adapters)
    report, session = owner.export("swappable.onnx", both, adapters="input", shared_cache=True)
    assert (report.task, report.verified) == ("text-generation-with-past", True)
    rows = [row for row in report.checks if row.output == "tokens"]
    assert {(row.what, row.shape) for row in rows} >= {
        ("base", "32 tokens"),
        ("french", "32 tokens"),
    }
    layers = sum(f"past_key_values.{n}.key" in session.inputs for n in range(3))
    assert layers > 0
    called = {node.op_type for node in onnx.load(tmp_path / "swappable.onnx").graph.node}
    assert OPERATOR in called
    assert "Attention" not in called
    for adapter, tokens in wanted.items():
        file = None if adapter is None else tmp_path / f"{adapter}.onnx_adapter"
        for own in owner.adapters:
            if own.name == adapter:
                export_adapter(
                    own, tmp_path / "swappable.onnx", tmp_path / f"{adapter}.onnx_adapter"
                )
        found = session.generate(IDS, 32, attention_mask=MASK, adapter=file, eos_token_id=[])
        assert torch.equal(torch.from_numpy(found), tokens), adapter
    merged = fold(inject(gm, owner.adapters[0]))
    report, session = owner.export("merged.onnx", merged)
    assert report.verified
    assert report.spellings[FuseAttention.what] == layers
    called = {node.op_type for node in onnx.load(tmp_path / "merged.onnx").graph.node}
    assert "GatherND" not in called  # its mask is read whole
    found = session.generate(IDS, 32, attention_mask=MASK, eos_token_id=[])
    assert torch.equal(torch.from_numpy(found), wanted["french"])
    assert not torch.equal(torch.from_numpy(found), wanted["legal"])


@pytest.fixture(scope="module")
def llama(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with its export, alone and with the logits of the last position."""
    home = tmp_path_factory.mktemp("llama")
    decoder("LlamaForCausalLM", num_hidden_layers=2).save_pretrained(home / "base")
    (home / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    (home / "base" / "README.md").write_text("A model.")
    given: Any = (str(home / "base"), [], "merged")
    export_model(*given, home / "whole", False, lambda _: None)
    export_model(*given, home / "last", False, lambda _: None, last_logits=True)
    export_model(*given, home / "plain", False, lambda _: None, task="text-generation")
    return home


def session_of(directory: Path) -> Session:
    return Session(directory / "model.onnx", threads=1)


def test_a_rollout_ends_with_the_positions_of_the_model(tmp_path: Path) -> None:
    decoder("GPT2LMHeadModel", max_position_embeddings=24).save_pretrained(tmp_path / "base")
    report = export_model(
        str(tmp_path / "base"), [], "merged", tmp_path / "o", False, lambda _: None
    )
    row = next(row for row in report.checks if row.output == "tokens")
    assert 8 <= int(row.shape.split()[0]) < 24
    assert report.verified


def test_inputs_and_outputs_have_optimum_s_names(llama: Path) -> None:
    session = session_of(llama / "whole")
    cache = [f"{n}.{part}" for n in (0, 1) for part in ("key", "value")]
    assert session.inputs == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in cache)
    ]  # fmt: skip
    assert session.outputs == ["logits", *(f"present.{c}" for c in cache)]
    plain = session_of(llama / "plain")
    assert (plain.inputs, plain.outputs) == (["input_ids", "attention_mask"], ["logits"])


def test_a_prompt_in_pieces_gives_what_the_whole_gives(llama: Path) -> None:
    session = session_of(llama / "whole")
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    empty = {name: np.zeros((2, 2, 0, 8), np.float32) for name in session.inputs if "past" in name}
    feed = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    whole = session.run(feed | empty)
    first = {"input_ids": IDS[:, :7], "attention_mask": MASK[:, :7]}
    before = session.run(first | {"position_ids": positions[:, :7]} | empty)
    past = {k.replace("present", "past_key_values"): v for k, v in before.items() if "pres" in k}
    rest = {"input_ids": IDS[:, 7:], "attention_mask": MASK, "position_ids": positions[:, 7:]}
    after = session.run(rest | past)
    np.testing.assert_allclose(after["logits"], whole["logits"][:, 7:], rtol=1e-4, atol=1e-4)
    assert np.abs(after["logits"] - whole["logits"][:, :5]).max() > 0.1
    last = session_of(llama / "last").run(feed | empty)["logits"]
    assert last.shape == (2, 1, 97)
    np.testing.assert_allclose(last, whole["logits"][:, -1:], rtol=1e-4, atol=1e-4)


def test_the_directory_has_what_clients_need_and_no_more(llama: Path) -> None:
    names = {path.name for path in (llama / "whole").iterdir()}
    assert names == {
        "model.onnx", "report.json", "config.json", "generation_config.json", "genai_config.json",
        "tokenizer.json",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (llama / "whole" / name).read_bytes() == (llama / "base" / name).read_bytes()
    genai = json.loads((llama / "whole" / "genai_config.json").read_text())["model"]
    assert (genai["eos_token_id"], genai["decoder"]["head_size"]) == ([2], 8)
    assert genai["decoder"]["num_key_value_heads"] == 2
    assert "genai_config.json" not in {path.name for path in (llama / "plain").iterdir()}


@pytest.mark.parametrize("directory", ["whole", "last", "plain"])
def test_a_file_is_verified_for_the_task_that_it_notes(llama: Path, directory: str) -> None:
    file, spec = llama / directory / "model.onnx", str(llama / "base")
    assert verify_model(file, spec, [], lambda _: None).verified
    other = "text-generation" if directory != "plain" else "text-generation-with-past"
    with pytest.raises(ExportError, match=r"has inputs .*; the model it is held against has"):
        verify_model(file, spec, [], lambda _: None, task=other)


def test_a_cache_in_place_stays_so_in_files_made_of_the_file(llama: Path, tmp_path: Path) -> None:
    spec, file = str(llama / "base"), tmp_path / "out" / "model.onnx"
    export_model(
        spec, [], "swappable", file.parent, False, lambda _: None, slots=["all-linear"],
        shared_cache=True,
    )  # fmt: skip
    genai = json.loads((file.parent / "genai_config.json").read_text())
    assert genai["search"]["past_present_share_buffer"] is True
    assert verify_model(file, spec, [], lambda _: None).verified
    model: Any = load(spec, [], None)[0].model
    shapes = {slot: tuple(model.get_submodule(slot).weight.shape) for slot in Session(file).slots}
    adapter = make_adapter(shapes, scale=0.5)
    assert merge_onnx(file, adapter, tmp_path / "merged.onnx").verified
    assert quantize_onnx(file, tmp_path / "packed.onnx").verified
    active = export_adapter(adapter, file, tmp_path / "a.onnx_adapter").path
    given: Any = {"attention_mask": MASK, "eos_token_id": []}
    wanted = Session(file).generate(IDS, 16, adapter=active, **given)
    assert not np.array_equal(wanted, Session(file).generate(IDS, 16, **given))
    merged = Session(tmp_path / "merged.onnx")
    assert np.array_equal(wanted, merged.generate(IDS, 16, **given))
    for name in ("merged.onnx", "packed.onnx"):
        assert writes_in_place(onnx.load(tmp_path / name))
    of_others = onnx.load(tmp_path / "merged.onnx")
    kept = [each for each in of_others.metadata_props if each.key != AXES]
    del of_others.metadata_props[:]
    of_others.metadata_props.extend(kept)
    onnx.save(of_others, tmp_path / "theirs.onnx")
    theirs = Session(tmp_path / "theirs.onnx", check=False)
    assert theirs.generate(IDS[1:], 2, eos_token_id=[]).shape == (1, 14)
    with pytest.raises(ExportError, match="give each prompt alone"):
        theirs.generate(IDS, 2, **given)
    of_others.graph.input[-1].type.tensor_type.shape.dim[3].dim_param = "size"
    onnx.save(of_others, tmp_path / "theirs.onnx")
    nameless = Session(tmp_path / "theirs.onnx", check=False)
    with pytest.raises(ExportError, match=r"heads and size as numbers"):
        nameless.generate(IDS[1:], 2)
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"head_size": -1}}}')
    with pytest.raises(ExportError, match=r"or the size as head_size in a genai_config.json"):
        nameless.generate(IDS[1:], 2)
    genai["model"]["eos_token_id"] = int(theirs.generate(IDS[1:], 2, eos_token_id=[])[0, 12])
    (tmp_path / "genai_config.json").write_text(json.dumps(genai))
    wanted = theirs.generate(IDS[1:], 8, eos_token_id=[])
    assert np.array_equal(nameless.generate(IDS[1:], 8, eos_token_id=[]), wanted)
    assert np.array_equal(nameless.generate(IDS[1:], 8), wanted[:, :13]), "ends as its config says"
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    past = {n: np.zeros((2, 2, 3, 8), np.float32) for n in merged.inputs if n.startswith("past")}
    feed = {"input_ids": IDS[:, 3:], "attention_mask": MASK, "position_ids": positions[:, 3:]}
    with pytest.raises(ExportError, match="batch_size must be 1 when sequence_length > 1"):
        merged.run(feed | past)


@pytest.mark.parametrize("options", [{"portable": True}, {"opset": 20}])
def test_a_cache_in_place_needs_attention_as_one_operator(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    gm = load(str(llama / "base"), [], None)[0].traced()
    with pytest.raises(ExportError, match=r"shared_cache: .*opset 23"):
        to_onnx(gm, tmp_path / "m.onnx", shared_cache=True, **options)
    assert not [*tmp_path.iterdir()]


class Streamer:
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.seen.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_generation_ends_where_the_config_says_and_pads_what_goes_on(llama: Path) -> None:
    session, streamer = session_of(llama / "whole"), Streamer()
    free = session.generate(IDS, 8, attention_mask=MASK, eos_token_id=[])
    assert free.shape == (2, 20)
    end = int(free[0, 14])  # the third token of the first row
    stops = session.generate(
        IDS, 8, attention_mask=MASK, eos_token_id=end, pad_token_id=0, streamer=streamer
    )
    place = 12 + free[0, 12:].tolist().index(end)
    assert stops[0, : place + 1].tolist() == free[0, : place + 1].tolist()
    assert not stops[0, place + 1 :].any()
    assert streamer.seen[0] == IDS.flatten().tolist()
    assert streamer.seen[1] == stops[:, 12].tolist()
    assert streamer.ended == 1


def test_sampling_is_repeated_by_its_seed_and_keeps_to_the_likeliest(llama: Path) -> None:
    session = session_of(llama / "whole")

    def draw(**given: Any) -> list[int]:
        found: list[int] = session.generate(IDS, 6, attention_mask=MASK, **given)[:, 12:].tolist()
        return found

    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1)
    assert draw(temperature=2.0, seed=1) != draw(temperature=2.0, seed=2)
    assert draw(temperature=2.0, top_k=1, seed=1) == draw()
    assert draw(temperature=2.0, top_p=1e-6, seed=2) == draw()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: give a whole number, at least 1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5: give a whole number"),
        ({"input_ids": [[1, 2], [3]]}, "'input_ids' is no plain tensor"),
        ({"input_ids": IDS - 60}, "tokens are at least 0"),
        ({"attention_mask": MASK * 2}, "its mask is 1, or 0 where it is padded"),
        ({"temperature": -1.0}, "temperature=-1.0, top_k=0"),
        ({"top_p": 0.0}, "a top_p above 0"),
        ({"attention_mask": MASK.flip(1)}, "padded on the left"),
        ({"attention_mask": MASK[:, 1:]}, r"expected \(batch, sequence\)"),
        ({"input_ids": IDS[0]}, r"input_ids is \(12,\)"),
        ({"input_ids": IDS.float()}, "a prompt is integers"),
    ],
)
def test_generation_refuses_what_it_cannot_do(
    llama: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        session_of(llama / "whole").generate(**{"input_ids": IDS, **given})
    with pytest.raises(ExportError, match="no decoder with a cache: it takes input_ids, attention"):
        session_of(llama / "plain").generate(IDS)


def test_what_keeps_another_cache_is_refused_with_another_task(tmp_path: Path) -> None:
    kind: Any = transformers.MambaForCausalLM
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50)
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(
        LoraFxError, match=r"a mamba cannot be exported with a cache.*--task text-g"
    ):
        find_model(str(tmp_path))


@pytest.mark.parametrize("task", [None, "text-generation"])
def test_a_model_that_fails_on_its_inputs_is_refused_so(tmp_path: Path, task: Any) -> None:
    """A choice of five experts among four: no other task, or axis, would help."""
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=5, vocab_size=50,
    )  # fmt: skip
    kind: Any = transformers.MixtralForCausalLM
    kind(config).save_pretrained(tmp_path)
    reason = r"MixtralForCausalLM does not run on the example inputs: .*k out.*Mend its config"
    with pytest.raises(LoraFxError, match=reason):
        find_model(str(tmp_path), task=task).traced()


@pytest.mark.parametrize("task", ["text-generation", "text-generation-with-past"])
def test_a_task_may_be_named_and_an_unknown_one_is_refused(llama: Path, task: str) -> None:
    source = find_model(str(llama / "base"), task=task)
    assert source.task["lora_fx.task"] == task
    with pytest.raises(LoraFxError, match=r"--task 'poetry': expected one of text2text-generation"):
        find_model(str(llama / "base"), task="poetry")
    with pytest.raises(LoraFxError, match=r"the task is fill-mask.*no class for a llama"):
        find_model(str(llama / "base"), task="fill-mask")


def test_module_paths_stay_those_of_the_model(llama: Path) -> None:
    gm = load(str(llama / "base"), [], None)[0].traced()
    targets = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    assert "model.layers.0.self_attn.q_proj.weight" in targets
