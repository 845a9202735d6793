"""Encoders and decoders in three files, an adapter split among them, against PEFT's generation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from torch import nn

from lora_fx import AdapterError, ExportError, Session, load_adapter, save_adapter
from lora_fx.cli.commands import export_model, verify_model
from lora_fx.cli.parts import Parts
from lora_fx.errors import VerificationError
from lora_fx.export.onnx_model.model_file import load_proto
from lora_fx.export.rewriting import one_decoder
from lora_fx.tasks.calls import Prepared
from lora_fx.tasks.seq2seq import in_three

SIZES: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97,
        "decoder_start_token_id": 0, "tie_word_embeddings": False,
    },
    "BartForConditionalGeneration": {"max_position_embeddings": 64},
    "WhisperForConditionalGeneration": {
        "max_source_positions": 30, "max_target_positions": 64, "num_mel_bins": 20,
        "decoder_start_token_id": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    },
}  # fmt: skip
LAYERS = {
    "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": 97,
}  # fmt: skip
OWN_STATES: dict[str, dict[str, Any]] = {
    "MoonshineForConditionalGeneration": {
        "hidden_size": 32, "intermediate_size": 48, "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4, "vocab_size": 97,
        "decoder_num_attention_heads": 4,
    },
    "NllbMoeForConditionalGeneration": LAYERS | {
        "max_position_embeddings": 64, "num_experts": 4, "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
    },
}  # fmt: skip
ONE = "decoder_model_merged"
FILES = ("encoder_model", "decoder_model", "decoder_with_past_model")
TOKENS = 16


def made(name: str) -> Any:
    kind: Any = getattr(transformers, name)
    own = OWN_STATES.get(name) or (LAYERS if name[:2] != "T5" else {}) | SIZES[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**own)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 20, 60, generator=make)}
    ids = torch.randint(3, 97, (2, 9), generator=make)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def home(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("in_three")


@functools.cache
def owner(name: str, home: Path) -> tuple[Any, list[list[int]], list[list[int]]]:
    """PEFT's model, saved beside its base, and the tokens of base and adapter."""
    base, home = made(name), home / name
    base.save_pretrained(home / "base")
    targets = ["q", "v", "wo"] if name.startswith("T5") else ["q_proj", "v_proj", "fc2"]
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    plain = by_hand(base)
    tuned: Any = peft.get_peft_model(base, config).eval()
    tuned.save_pretrained(home / "french")
    return tuned, plain, by_hand(tuned.base_model.model)


def by_hand(model: Any) -> list[list[int]]:
    """Greedy tokens of the model's own forward, all of them anew at each step."""
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(**inputs_of(model), decoder_input_ids=start, use_cache=False).logits
            start = torch.cat([start, logits[:, -1:].argmax(-1)], 1)
    found: list[list[int]] = start.tolist()
    return found


def from_files(directory: Path, model: Any, adapter: str | None = None) -> list[list[int]]:
    """The same with three sessions, each token once."""
    encoder, first, later = (Session(directory / f"{name}.onnx", threads=1) for name in FILES)
    files = [directory / f"{adapter}.{name}.onnx_adapter" if adapter else None for name in FILES]
    given = inputs_of(model)
    hidden = encoder.run(given, files[0])["last_hidden_state"]
    mask = {"encoder_attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    ids = np.full((2, 1), model.config.decoder_start_token_id)
    out = first.run({"input_ids": ids, "encoder_hidden_states": hidden, **mask}, files[1])
    every = [ids]
    past: dict[str, Any] = {}
    for _ in range(TOKENS):
        ids = out["logits"][:, -1:].argmax(-1)
        every.append(ids)
        past |= {k.replace("present", "past_key_values"): v for k, v in out.items() if "." in k}
        out = later.run({"input_ids": ids, **mask, **past}, files[2])
    found: list[list[int]] = np.concatenate(every, 1).tolist()
    return found


def from_one(directory: Path, model: Any) -> list[list[int]]:
    """The same with both steps of the decoder in one file, by its flag."""
    encoder, decoder = (Session(directory / f"{name}.onnx", threads=1) for name in (FILES[0], ONE))
    given = inputs_of(model)
    hidden = encoder.run(given)["last_hidden_state"]
    feeds: dict[str, Any] = {"encoder_hidden_states": hidden}
    if "attention_mask" in given:
        feeds["encoder_attention_mask"] = given["attention_mask"]
    every = [np.full((2, 1), model.config.decoder_start_token_id)]
    for value in load_proto(directory / f"{ONE}.onnx").graph.input:
        if value.name.startswith("past_key_values"):
            sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
            feeds[value.name] = np.zeros([2, *sizes[1:]], np.float32)
    for step in range(TOKENS + 1):
        out = decoder.run(
            feeds | {"input_ids": every[-1], "use_cache_branch": np.array([step > 0])}
        )
        presents = {k.replace("present", "past_key_values"): v for k, v in out.items() if "." in k}
        if step:
            kept = {name: value for name, value in presents.items() if "encoder" in name}
            assert {value.shape[0] for value in kept.values()} == {0}
            presents = {k: v for k, v in presents.items() if k not in kept}
        feeds |= presents
        every.append(out["logits"][:, -1:].argmax(-1))
    found: list[list[int]] = np.concatenate(every[:-1], 1).tolist()
    return found


@pytest.mark.parametrize("name", SIZES)
def test_three_files_generate_what_the_model_does(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, plain, wanted = owner(name, home)
    model = tuned.base_model.model
    assert plain != wanted
    spec, adapters = str(home / name / "base"), [home / name / "french"]
    mode, out = "swappable" if name.startswith("T5") else "merged", tmp_path / "out"
    report = export_model(spec, adapters, mode, out, False, lambda _: None)
    assert isinstance(report, Parts)
    assert report.verified
    if mode == "swappable":
        assert from_files(out, model) == plain
        assert from_files(out, model, "french") == wanted
    else:
        assert from_files(out, model) == wanted
        assert from_one(out, model) == wanted
    told = json.loads((out / "report.json").read_text())
    assert (told["verified"], len(told["parts"])) == (True, 3 if mode == "swappable" else 4)
    speech = "automatic-speech-recognition" if "Whisper" in name else "text2text-generation"
    assert told["task"] == f"{speech}-with-past"
    if "Whisper" in name:
        last = out / f"{FILES[-1]}.onnx"
        assert verify_model(last, spec, adapters, lambda _: None).verified
        with pytest.raises(
            ExportError, match=r"merged\.onnx: is decoder_model.* in one, .*: give these"
        ):
            verify_model(out / f"{ONE}.onnx", spec, adapters, lambda _: None)
        check_joined(out, monkeypatch)


def check_joined(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of both steps stand there once; steps the wrong way round are no file."""
    sizes = [sum(len(t.raw_data) for t in load_proto(out / f"{name}.onnx").graph.initializer)
             for name in (*FILES[1:], ONE)]  # fmt: skip
    assert sizes[2] < 1.1 * sizes[0] < 0.7 * (sizes[0] + sizes[1])
    joined, places = one_decoder._joined, [out / f"{name}.onnx" for name in FILES[1:]]
    monkeypatch.setattr(one_decoder, "_joined", lambda models, said: turned(*joined(models, said)))
    with pytest.raises(VerificationError, match=r"decoder_sequence_length=.*use_cache_branch=0"):
        one_decoder.join_decoders(*places, out / "odd.onnx")
    assert not (out / "odd.onnx").exists()


def turned(model: ir.Model, known: dict[str, str]) -> tuple[ir.Model, dict[str, str]]:
    choice = next(node for node in model.graph if node.op_type == "If")
    one, other = choice.attributes["then_branch"], choice.attributes["else_branch"]
    first, later = other.as_graph(), one.as_graph()
    choice.attributes["then_branch"] = ir.AttrGraph("then_branch", first)
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", later)
    return model, known


@pytest.mark.parametrize("name", OWN_STATES)
def test_states_are_of_the_class_that_the_decoder_knows(name: str) -> None:
    model = made(name)
    encoder, first, later = in_three(model, Prepared())
    with torch.no_grad():
        given = dict(encoder.kwargs)
        ids = first.kwargs["input_ids"]
        wanted = model(**given, decoder_input_ids=ids).logits
        found = first.model(**first.kwargs)["logits"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, model(**given, decoder_input_ids=ids + 1).logits)
        more = torch.cat([ids, later.kwargs["input_ids"]], 1)
        wanted = model(**given, decoder_input_ids=more).logits[:, ids.shape[1] :]
        torch.testing.assert_close(
            later.model(**later.kwargs)["logits"], wanted, rtol=1e-5, atol=1e-5
        )


def test_what_no_part_has_a_place_for_is_refused(home: Path, tmp_path: Path) -> None:
    name = "BartForConditionalGeneration"
    owner(name, home)
    adapter = load_adapter(home / name / "french")
    path = next(iter(adapter.updates))
    updates = dict(adapter.updates) | {"model.decoder.layers.9.fc2": adapter.updates[path]}
    save_adapter(type(adapter)("odd", updates), tmp_path / "odd")
    less = {k: u for k, u in adapter.updates.items() if k != path}
    given: Any = (str(home / name / "base"),)
    with pytest.raises(
        AdapterError, match=r"odd: model\.decoder\.layers\.9\.fc2 match nothing in any of"
    ):
        export_model(*given, [tmp_path / "odd"], "merged", tmp_path / "a", False, lambda _: None)
    save_adapter(type(adapter)("less", less, expects=adapter.expects), tmp_path / "less")
    assert not (tmp_path / "a").exists()
