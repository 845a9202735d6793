"""Training PEFT adapters so that texts of one module lie close together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from lora_fx.demo.docstrings import Texts
from lora_fx.demo.encoder import BATCH, Tokenizer, pool
from lora_fx.demo.parallel import side_by_side


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made.

    Attributes:
        rank: of the update of each layer.
        alpha: the scale is alpha / rank.
        targets: as PEFT's ``target_modules`` takes them.
        layers: numbers of the transformer layers to adapt; None: all.
        learning_rate: at its peak.
        temperature: cosines are divided by it before the softmax.
        seed: of the adapter's first values and of the order of texts.
    """

    rank: int
    alpha: int
    targets: str | list[str]
    layers: list[int] | None = None
    learning_rate: float = 2e-3
    temperature: float = 0.05
    seed: int = 0


@dataclass
class Trainer:
    """The state of one training.

    The model stays in eval mode: its dropout would draw from the one random state of the
    process, and two trainings side by side would then differ from run to run.

    Attributes:
        model: of `add_adapter`; its adapter is trained in place.
        texts: to train on.
        recipe: how.
        centres: (labels, width), the base's centroids. Directions of the labels start there, are
            trained too, and then dropped.
        tokenizer: of the encoder.
        epochs: times that each text will be seen.
    """

    model: Any
    texts: Texts
    recipe: Recipe
    centres: torch.Tensor
    tokenizer: Tokenizer
    epochs: int
    _optimizer: torch.optim.Optimizer = field(init=False)
    _schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)

    def __post_init__(self) -> None:
        """Sets up the optimiser: a short rise to the learning rate, then a long fall."""
        self.model.eval()
        self._proxies = nn.Parameter(self.centres.clone())
        self._order = torch.Generator().manual_seed(self.recipe.seed)
        self._lengths = self.tokenizer.lengths(self.texts.texts)
        peak, steps = self.recipe.learning_rate, self.epochs * -(-len(self._lengths) // BATCH)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW([*trained, self._proxies], lr=peak)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, peak, steps, pct_start=0.15
        )

    def epoch(self) -> None:
        """Sees each text once."""
        labels = torch.tensor(self.texts.labels)
        for places in self._batches():
            batch = self.tokenizer.batch([self.texts.texts[place] for place in places])
            self._step(batch, labels[places])

    def _batches(self) -> Iterator[list[int]]:
        """Texts of like length, in random order; those of one length change company."""
        shuffled = torch.randperm(len(self._lengths), generator=self._order).tolist()
        order = sorted(shuffled, key=self._lengths.__getitem__)
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        for place in torch.randperm(len(parts), generator=self._order).tolist():
            yield parts[place]

    def _step(self, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        """One update: each text towards its label's proxy, away from the others."""
        hidden = self.model(**batch).last_hidden_state
        cosines = pool(hidden, batch["attention_mask"]) @ normalize(self._proxies, dim=-1).T
        loss = cross_entropy(cosines / self.recipe.temperature, labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()


def add_adapter(encoder: nn.Module, recipe: Recipe) -> Any:
    """A fresh adapter of PEFT on an encoder, which is wrapped in place."""
    import peft

    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        layers_to_transform=recipe.layers,
    )
    return peft.get_peft_model(encoder, config)


def train(trainers: Sequence[Trainer], progress: Callable[[str], None]) -> None:
    """Trains all adapters, side by side, epoch by epoch.

    Args:
        trainers: of as many epochs each.
        progress: told the epoch.
    """
    epochs = trainers[0].epochs
    for epoch in range(epochs):
        progress(f"train {len(trainers)} adapters: epoch {epoch + 1} of {epochs}")
        side_by_side(Trainer.epoch, trainers)
