"""The page of examples/web, clicked through, shows what PEFT computes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_fx.demo.encoder import load_extra, load_tokenizer, pool
from lora_fx.testing import relative
from tests.web.conftest import ROOT, run

QUERIES = ("Finish one request.", "Naïve CAFÉ — 東京's don't-stop 🙂 “x” ﬁ\u200b " + "a" * 120)
ADAPTERS = ("language", "network")
NONE = "no adapter"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small encoder with the vocabulary of the demo's, and PEFT's models of it."""
    home, sizes = tmp_path_factory.mktemp("encoder"), {"hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, vocab_size=30522
    )
    base: Any = transformers.BertModel(config).eval()
    base.save_pretrained(home / "base")
    shutil.copy(load_extra() / "vocab.txt", home / "base" / "vocab.txt")
    models = {NONE: base}
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        given = peft.LoraConfig(r=2 + seed, target_modules=["query", "dense"], lora_alpha=16)
        again: Any = transformers.BertModel.from_pretrained(home / "base")
        models[name] = peft.get_peft_model(again, given).eval()
        for key, value in models[name].named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=0.2)
        models[name].save_pretrained(home / name)
    return home, models


@pytest.fixture(scope="module")
def page(encoder: Any, served: tuple[Path, str], tmp_path_factory: Any) -> Any:
    """What the page shows of each text with each adapter, and what its browser said."""
    (home, _), (site, address) = encoder, served
    spec = importlib.util.spec_from_file_location("build", ROOT / "examples" / "web" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(home / "base", [home / name for name in ADAPTERS], site / "page")
    (site / "page" / "node_modules").symlink_to(site / "node_modules")
    profile = str(tmp_path_factory.mktemp("profile"))
    clicks = [(query, name) for query in QUERIES for name in (*ADAPTERS, NONE)]
    url = f"{address}/page/index.html"
    return run("in_browser.mjs", url=url, profile=profile, clicks=clicks, sizes=[1280, 390, 320])


@torch.no_grad()
def expected(model: Any, texts: list[str]) -> torch.Tensor:
    tokenize = load_tokenizer(load_extra()).tokenize
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    tokens = tokenize(texts, **options)
    found = pool(model(**tokens).last_hidden_state, tokens["attention_mask"])
    return found[1:] @ found[0]


def test_it_shows_what_peft_computes(page: Any, encoder: Any) -> None:
    texts = [t["text"] for t in json.loads((ROOT / "examples/web/texts.json").read_text())["texts"]]
    clicks = iter(page["found"]["found"])
    for query in QUERIES:
        wanted = {name: expected(model, [query, *texts]) for name, model in encoder[1].items()}
        for name in (*ADAPTERS, NONE):
            click = next(clicks)
            assert click["pressed"] == [name]
            scores = {row["text"]: row["score"] for row in click["rows"]}
            found = torch.tensor([scores[text] for text in texts])
            assert relative(found, wanted[name]) <= 1e-5
            others = [wanted[other] for other in wanted if other != name]
            assert min(relative(found, other) for other in others) > 1e-3
            assert list(scores.values()) == sorted(scores.values(), reverse=True)
            for row in click["rows"]:
                shown = row["shown"].split()
                assert any(abs(float(w) - row["score"]) <= 6e-4 for w in shown if is_number(w))


def is_number(word: str) -> bool:
    return word.removeprefix("-").replace(".", "", 1).isdigit()


def test_it_fits_its_window_and_nothing_is_reported(page: Any) -> None:
    assert page["found"]["wider"] == [0, 0, 0]
    assert page["told"] == []
