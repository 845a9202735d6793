"""How each form scores on the held-out texts, and how it compares with eager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_fx.demo.docstrings import Subject
from lora_fx.demo.encoder import Batches, Tokenizer
from lora_fx.demo.forms import Form, Measured
from lora_fx.demo.scoring import Score, centroids, score
from lora_fx.errors import VerificationError
from lora_fx.numerics import compare


@dataclass(frozen=True)
class Exam:
    """A subject ready to be put to a form.

    Attributes:
        subject: what is asked.
        train: its training texts.
        held_out: its held-out texts.
    """

    subject: Subject
    train: Batches
    held_out: Batches

    def score(self, states: list[torch.Tensor], centres: torch.Tensor) -> Score:
        """Scores the hidden states of the held-out texts."""
        return score(self.held_out.embed(states), self.subject.held_out.labels, centres)


@dataclass(frozen=True)
class Reference:
    """What eager makes of one subject, with the base or an adapter.

    Attributes:
        centres: (labels, width), centroids of its training texts.
        states: hidden states of its held-out texts, batch by batch.
    """

    centres: torch.Tensor
    states: list[torch.Tensor]


@dataclass(frozen=True)
class Judge:
    """Scores forms on the held-out texts, against one reference for each set of weights.

    The base sits the exams of all subjects, an adapter that of its own.

    Attributes:
        exams: what to score on.
        references: (weights, subject) -> what eager made of the subject.
    """

    exams: list[Exam]
    references: dict[tuple[str, str], Reference] = field(default_factory=dict)

    @classmethod
    def of(cls, subjects: Sequence[Subject], tokenizer: Tokenizer) -> Judge:
        """Tokenizes every text once."""
        return cls(
            [
                Exam(s, tokenizer.batches(s.train.texts), tokenizer.batches(s.held_out.texts))
                for s in subjects
            ]
        )

    def refer(self, form: Form) -> Measured:
        """Makes an eager form the reference for all forms of its weights."""
        scores = {}
        for exam in self._exams(form):
            embeddings = exam.train.embed(exam.train.states(form.encode))
            centres = centroids(embeddings, exam.subject.train.labels)
            reference = Reference(centres, exam.held_out.states(form.encode))
            self.references[form.weights, exam.subject.name] = reference
            scores[exam.subject.name] = exam.score(reference.states, centres)
        return Measured(form, scores)

    def measure(self, form: Form) -> Measured:
        """Runs an exported form on the held-out texts.

        The centroids are eager's: what was indexed there must be found by the exported form.

        Raises:
            VerificationError: the form and eager disagree.
        """
        scores, worst = {}, 0.0
        for exam in self._exams(form):
            reference = self.references[form.weights, exam.subject.name]
            states = exam.held_out.states(form.encode)
            worst = max(worst, _worst(form, states, reference.states))
            scores[exam.subject.name] = exam.score(states, reference.centres)
        return Measured(form, scores, worst)

    def _exams(self, form: Form) -> list[Exam]:
        return [exam for exam in self.exams if form.weights in ("base", exam.subject.name)]


def _worst(form: Form, states: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest absolute difference, of states that agree within the tolerance."""
    pairs = zip(states, expected, strict=True)
    comparisons = [compare(found, wanted) for found, wanted in pairs]
    for comparison in comparisons:
        if not comparison.ok:
            what = f"{form.name} with {form.weights} weights"
            raise VerificationError(f"demo: {what} disagrees with eager: {comparison}")
    return max(comparison.max_abs for comparison in comparisons)
