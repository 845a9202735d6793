"""Nearest-centroid classification of embeddings, and how sure its score is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Score:
    """Which of a list of texts were told right.

    Attributes:
        right: one a text, in the order of the texts.
    """

    right: tuple[bool, ...]

    @property
    def total(self) -> int:
        """How many texts."""
        return len(self.right)

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.right) / self.total

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float((self.accuracy * (1 - self.accuracy) / self.total) ** 0.5)

    def __str__(self) -> str:
        """Accuracy and standard error in percent."""
        return f"{100 * self.accuracy:.1f} ± {100 * self.error:.1f}"


def gain(base: Score, other: Score) -> tuple[float, float]:
    """How much better one score is than another on the same texts, and its standard error.

    The error is that of the mean of the paired differences: texts that both tell alike cannot
    move it (McNemar, Psychometrika 12, 1947).
    """
    pairs = zip(base.right, other.right, strict=True)
    steps = torch.tensor([float(b) - float(a) for a, b in pairs], dtype=torch.float64)
    return steps.mean().item(), (steps.std() / len(steps) ** 0.5).item()


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
    return Score(tuple((nearest == torch.tensor(labels)).tolist()))
