"""Nearest-centroid classification of embeddings, and how sure its score is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Score:
    """Correct answers out of a number of trials.

    Attributes:
        correct: answers that were right.
        total: all answers.
    """

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.correct / self.total

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float((self.accuracy * (1 - self.accuracy) / self.total) ** 0.5)

    def __str__(self) -> str:
        """Accuracy and standard error in percent."""
        return f"{100 * self.accuracy:.1f} ± {100 * self.error:.1f}"


def centroids(embeddings: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """The mean direction of each label's embeddings.

    Args:
        embeddings: (texts, width), each of length one.
        labels: one a text, from 0; every label up to the largest has a text.

    Returns:
        (labels, width), each of length one.
    """
    index = torch.tensor(labels)
    means = [embeddings[index == label].mean(0) for label in range(max(labels) + 1)]
    return normalize(torch.stack(means), dim=-1)


def score(embeddings: torch.Tensor, labels: list[int], centres: torch.Tensor) -> Score:
    """Counts the texts whose nearest centroid, by cosine, is that of their label."""
    nearest = (embeddings @ centres.T).argmax(dim=1)
    return Score(int((nearest == torch.tensor(labels)).sum()), len(labels))
