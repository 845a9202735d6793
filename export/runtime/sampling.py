"""How the next token is chosen, and what ends a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.errors import ExportError
from lora_fx.io.strict_json import read_json

GENAI = "genai_config.json"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: of how many of the likeliest one is drawn; 0: of all.
        top_p: the fewest of the likeliest whose probabilities reach this are left.
        seed: of the random numbers; None: other ones each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ExportError: one is out of its range; says which.
        """
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ExportError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: expected "
                "a temperature and a top_k of at least 0, and a top_p above 0 and at most 1"
            )
        if isinstance(self.seed, int | np.integer) and self.seed < 0:
            raise ExportError(f"seed={self.seed}: give a number of at least 0, or None")

    def chooser(self) -> Callable[[Array], Array]:
        """From logits (batch, vocabulary) to tokens (batch,)."""
        if self.temperature == 0:
            return lambda logits: logits.argmax(-1)
        source = np.random.default_rng(self.seed)
        return lambda logits: np.array([self._drawn(row, source) for row in logits])

    def _drawn(self, logits: Array, source: np.random.Generator) -> int:
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        chosen = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):  # far below the likeliest, at a low temperature
            chances = np.exp((chosen - chosen.max()) / self.temperature)
        chances /= chances.sum()
        count = int(np.searchsorted(chances.cumsum(), self.top_p)) + 1
        left = chances[:count] / chances[:count].sum()
        return int(order[source.choice(len(left), p=left)])


@dataclass(frozen=True)
class Ends:
    """Tokens that end a text.

    Attributes:
        tokens: any of these.
        pad: what follows one where other rows go on.
    """

    tokens: tuple[int, ...]
    pad: int

    @classmethod
    def of(
        cls,
        model: Path,
        given: int | Sequence[int] | None,
        pad: int | None,
        genai: Mapping[str, Any],
    ) -> Ends:
        """Those that were given, or else those of the ``generation_config.json`` beside a file.

        Where there is none, those of the ``genai_config.json``, which `genai_model` has read.

        Raises:
            ExportError: that file is damaged.
        """
        beside, said = model.with_name("generation_config.json"), genai
        is_asked = given is None or pad is None
        if is_asked and beside.is_file():
            said = _object(read_json(beside, ExportError))
        elif is_asked:
            beside = model.with_name(GENAI)
        tokens: Any = said.get("eos_token_id") if given is None else given
        several = tokens if isinstance(tokens, list | tuple) else [tokens]
        padding = said.get("pad_token_id") if pad is None else pad
        for field, value in [("pad_token_id", padding), *(("eos_token_id", t) for t in several)]:
            if value is not None and not _is_token(value):
                raise ExportError(
                    f"{beside}: {field} holds {value!r:.80}, expected numbers of tokens: correct "
                    f"it, or pass {field}="
                )
        found = tuple(int(token) for token in several if token is not None)
        return cls(found, int(padding) if padding is not None else (found or (0,))[0])


def genai_model(model: Path) -> dict[str, Any]:
    """What onnxruntime-genai's config beside a file says of its model; empty without one.

    Raises:
        ExportError: that file is damaged.
    """
    beside = model.with_name(GENAI)
    return _object(_object(read_json(beside, ExportError)).get("model")) if beside.is_file() else {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_token(value: object) -> bool:
    """Whether a value can be the number of a token, as onnxruntime takes it."""
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_number and -1 <= int(value) < 1 << 31  # type: ignore[call-overload]
