"""Training a PEFT adapter so that texts of one module lie close together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from lora_fx.demo.docstrings import Texts
from lora_fx.demo.encoder import BATCH, Tokenizer, pool


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made.

    Attributes:
        rank: of the update of each layer.
        alpha: the scale is alpha / rank.
        targets: as PEFT's ``target_modules`` takes them.
        layers: numbers of the transformer layers to adapt; None: all.
        epochs: times that each text is seen.
        learning_rate: at its peak.
        temperature: cosines are divided by it before the softmax.
        seed: of the adapter's first values and of the order of texts.
    """

    rank: int
    alpha: int
    targets: str | list[str]
    layers: list[int] | None = None
    epochs: int = 3
    learning_rate: float = 2e-3
    temperature: float = 0.05
    seed: int = 0


@dataclass
class Trainer:
    """The state of one training.

    Attributes:
        model: of PEFT; its adapter is trained in place.
        recipe: how.
        proxies: (labels, width), a direction for each label, trained too and then dropped. They
            start at the base's centroids.
    """

    model: nn.Module
    recipe: Recipe
    proxies: nn.Parameter
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        """Sets up the optimiser."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW([*trained, self.proxies], lr=self.recipe.learning_rate)

    def schedule(self, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """A short rise to the learning rate, then a long fall."""
        peak = self.recipe.learning_rate
        return torch.optim.lr_scheduler.OneCycleLR(self._optimizer, peak, steps, pct_start=0.15)

    def step(self, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
        """One update: each text towards its label's proxy, away from the others."""
        hidden = self.model(**batch).last_hidden_state
        cosines = pool(hidden, batch["attention_mask"]) @ normalize(self.proxies, dim=-1).T
        loss = cross_entropy(cosines / self.recipe.temperature, labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()


def add_adapter(encoder: nn.Module, recipe: Recipe) -> nn.Module:
    """A fresh adapter of PEFT on an encoder, which is wrapped in place."""
    import peft

    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        layers_to_transform=recipe.layers,
    )
    return peft.get_peft_model(encoder, config)  # type: ignore[arg-type]  # any module will do


def train_adapter(
    model: nn.Module,
    texts: Texts,
    recipe: Recipe,
    centres: torch.Tensor,
    tokenizer: Tokenizer,
    progress: Callable[[str], None],
) -> None:
    """Trains the adapter of a model in place.

    The model stays in eval mode: its dropout would draw from the one random state of the
    process, and two trainings abreast would then differ from run to run.

    Args:
        model: from `add_adapter`.
        texts: to train on.
        recipe: how.
        centres: (labels, width), the base's centroids.
        tokenizer: of the encoder.
        progress: told the epoch.
    """
    model.eval()
    trainer = Trainer(model, recipe, nn.Parameter(centres.clone()))
    rounds = list(_rounds(tokenizer.lengths(texts.texts), recipe))
    schedule = trainer.schedule(len(rounds))
    labels = torch.tensor(texts.labels)
    for number, (epoch, places) in enumerate(rounds):
        if number == 0 or rounds[number - 1][0] != epoch:
            progress(f"epoch {epoch + 1} of {recipe.epochs}")
        batch = tokenizer.batch([texts.texts[place] for place in places])
        trainer.step(batch, labels[places])
        schedule.step()


def _rounds(lengths: list[int], recipe: Recipe) -> Iterator[tuple[int, list[int]]]:
    """Batches of like length in random order; texts of the same length change company."""
    source = torch.Generator().manual_seed(recipe.seed)
    for epoch in range(recipe.epochs):
        shuffled = torch.randperm(len(lengths), generator=source).tolist()
        order = sorted(shuffled, key=lengths.__getitem__)
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        for place in torch.randperm(len(parts), generator=source).tolist():
            yield epoch, parts[place]
