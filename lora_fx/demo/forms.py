"""The forms that a model takes, and what is measured of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fx.demo.encoder import Encode
from lora_fx.demo.scoring import Score


@dataclass(frozen=True)
class Form:
    """One way to run one model.

    Attributes:
        name: ``"merged"``, ``"swappable"``, ….
        weights: ``"base"`` or the adapter's name.
        encode: a batch to hidden states, (texts, tokens, width), on the thread that calls it.
        files: what has to be shipped.
    """

    name: str
    weights: str
    encode: Encode
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Row:
    """What was measured of one form.

    Attributes:
        form: its name.
        weights: ``"base"`` or the adapter's name.
        scores: subject -> accuracy on its held-out texts; an adapter has only its own.
        max_error: largest absolute difference of a hidden state from eager's; 0 for eager.
        sizes: bytes of each file.
        latency: median time over that of the merged form.
    """

    form: str
    weights: str
    scores: Mapping[str, Score]
    max_error: float
    sizes: tuple[int, ...]
    latency: float


@dataclass(frozen=True)
class Measured:
    """What the held-out texts say of one form.

    Attributes:
        form: what was run.
        scores: subject -> accuracy.
        max_error: largest absolute difference of a hidden state from eager's.
    """

    form: Form
    scores: Mapping[str, Score]
    max_error: float = 0.0
