"""The forms that a model takes, and how each compares with eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_fx.compare import compare
from lora_fx.demo.docstrings import Subject, Texts
from lora_fx.demo.encoder import Encode, Open, Tokenizer, pool
from lora_fx.demo.scoring import Score, centroids, score
from lora_fx.errors import VerificationError


@dataclass(frozen=True)
class Form:
    """One way to run one model.

    Attributes:
        name: ``"merged"``, ``"swappable"``, ….
        weights: ``"base"`` or the adapter's name.
        open: makes it ready to turn a batch into hidden states, (texts, tokens, width).
        files: what has to be shipped.
    """

    name: str
    weights: str
    open: Open
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Row:
    """What was measured of one form.

    Attributes:
        form: its name.
        weights: ``"base"`` or the adapter's name.
        scores: subject -> accuracy on its held-out texts.
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


@dataclass(frozen=True)
class Reference:
    """What eager makes of the subjects, with the base or one adapter.

    Attributes:
        centres: subject -> centroids of its training texts.
        hidden: subject -> hidden states of its held-out texts, batch by batch.
    """

    centres: Mapping[str, torch.Tensor]
    hidden: Mapping[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Judge:
    """Scores forms on the held-out texts, against one reference for each set of weights.

    Attributes:
        subjects: what to score on.
        tokenizer: of the encoder.
        references: weights -> what eager made of the subjects.
    """

    subjects: list[Subject]
    tokenizer: Tokenizer
    references: dict[str, Reference] = field(default_factory=dict)

    def refer(self, form: Form) -> Measured:
        """Makes an eager form the reference for all forms of its weights."""
        encode = form.open(None)
        centres = {s.name: self._centres(s.train, encode) for s in self.subjects}
        hidden = {s.name: self._states(s.held_out, encode) for s in self.subjects}
        self.references[form.weights] = Reference(centres, hidden)
        return Measured(form, self._scores(form, hidden))

    def measure(self, form: Form) -> Measured:
        """Runs an exported form on the held-out texts.

        The centroids are eager's: what was indexed there must be found by the exported form.

        Raises:
            VerificationError: the form and eager disagree.
        """
        encode = form.open(None)
        hidden = {s.name: self._states(s.held_out, encode) for s in self.subjects}
        expected = self.references[form.weights].hidden
        pairs = [pair for name in hidden for pair in zip(hidden[name], expected[name], strict=True)]
        comparisons = [compare(found, wanted) for found, wanted in pairs]
        for comparison in comparisons:
            if not comparison.ok:
                what = f"{form.name} with {form.weights} weights"
                raise VerificationError(f"demo: {what} disagrees with eager: {comparison}")
        worst = max(comparison.max_abs for comparison in comparisons)
        return Measured(form, self._scores(form, hidden), worst)

    def _states(self, texts: Texts, encode: Encode) -> list[torch.Tensor]:
        return [encode(batch) for _, batch in self.tokenizer.batches(texts.texts)]

    def _centres(self, texts: Texts, encode: Encode) -> torch.Tensor:
        return centroids(self._embeddings(texts, self._states(texts, encode)), texts.labels)

    def _scores(self, form: Form, hidden: Mapping[str, list[torch.Tensor]]) -> dict[str, Score]:
        centres = self.references[form.weights].centres
        return {
            subject.name: score(
                self._embeddings(subject.held_out, hidden[subject.name]),
                subject.held_out.labels,
                centres[subject.name],
            )
            for subject in self.subjects
        }

    def _embeddings(self, texts: Texts, hidden: list[torch.Tensor]) -> torch.Tensor:
        """(texts, width) in the order of the texts; batches are in the order of lengths."""
        batches = list(self.tokenizer.batches(texts.texts))
        order = torch.tensor([place for places, _ in batches for place in places])
        pooled = [
            pool(states, batch["attention_mask"])
            for states, (_, batch) in zip(hidden, batches, strict=True)
        ]
        return torch.cat(pooled)[order.argsort()]
