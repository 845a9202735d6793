"""What a fresh, trainable adapter is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType

import torch

from lora_fx.adapters.adapter import Update, check_name
from lora_fx.adapters.initialization import Weight, checked_init, initial
from lora_fx.adapters.scaling import (
    checked_alpha,
    checked_alphas,
    checked_rank,
    checked_ranks,
    is_number,
    scale_of,
)
from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.adapters.target_rule import TargetRule, pattern_value
from lora_fx.adapters.value import Value
from lora_fx.choices import takes
from lora_fx.errors import AdapterError, within
from lora_fx.layers.layer_types import TYPES

_MOST = (1 << 31) - 1  # of one axis


@dataclass(frozen=True)
class LoraConfig(Value):
    """The options of a new LoRA adapter, by the names that PEFT gives them.

    Attributes:
        r: rank of every update that ``rank_pattern`` does not name.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        target_modules: names, a regex, or ``"all-linear"``; see ``TargetRule``.
        dropout: probability of dropping an input of the branch in training, in [0, 1).
        use_rslora: scale by alpha / sqrt(r) (arXiv:2312.03732).
        rank_pattern: regex of a path, or of its end after a dot -> rank.
        alpha_pattern: regex of a path, or of its end after a dot -> alpha.
        exclude_modules: names or a regex of modules to leave alone.
        layers_to_transform: layer indices; with a list of names only.
        layers_pattern: regexes of the segment before the layer index.
        name: tells adapters apart in one graph; an identifier.
        seed: makes the initial values reproducible; None takes torch's global generator.
        init: where training starts: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"``, ``"pissa"``,
            ``"pissa_niter_<N>"`` or ``"olora"``; PEFT's ``init_lora_weights``, see `initial`.
            PiSSA and OLoRA change the base, and what they train fits the changed base alone, until
            the adapter as it started is taken off: ``combine([(trained, 1), (started, -1)])``.
        kind: of the updates; ``"lora"`` alone can be trained here, others are loaded.
        lora_alpha: ``alpha``, as PEFT spells it.
        lora_dropout: ``dropout``, as PEFT spells it.
        init_lora_weights: ``init``, as PEFT spells it; True is ``"kaiming"``.
    """

    r: int = 8
    alpha: float = 16
    target_modules: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    name: str = "default"
    seed: int | None = None
    init: str = "kaiming"
    kind: str = "lora"
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    init_lora_weights: InitVar[str | bool | None] = None

    def __post_init__(
        self,
        lora_alpha: float | None,
        lora_dropout: float | None,
        init_lora_weights: str | bool | None,
    ) -> None:
        """Closes the mappings and checks every option.

        Raises:
            AdapterError: an option of the wrong type or out of range, by name.
        """
        self._take("alpha", "lora_alpha", lora_alpha)
        self._take("dropout", "lora_dropout", lora_dropout)
        how = "kaiming" if init_lora_weights is True else init_lora_weights
        self._take("init", "init_lora_weights", how)
        ranks, alphas = checked_ranks(self.rank_pattern), checked_alphas(self.alpha_pattern)
        object.__setattr__(self, "rank_pattern", MappingProxyType(ranks))
        object.__setattr__(self, "alpha_pattern", MappingProxyType(alphas))
        if max([checked_rank("r", self.r), *ranks.values()]) > _MOST:
            raise AdapterError(f"r or rank_pattern asks for more than {_MOST}: give a rank of less")
        checked_alpha("alpha", self.alpha)
        checked_init(self.init)
        check_name(self.name)
        if self.kind != "lora":
            raise AdapterError(
                f"kind is {self.kind!r:.80}, expected 'lora': adapters of other kinds can be "
                "loaded (lora_fx.load_adapter), injected and folded, but not trained here"
            )
        if not isinstance(self.use_rslora, bool):
            raise AdapterError(f"use_rslora is {self.use_rslora!r}, expected true or false")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout!r}, expected a number in [0, 1)")
        is_seed = type(self.seed) is int and -(1 << 63) <= self.seed < 1 << 64
        if not (is_seed or self.seed is None):
            raise AdapterError(f"seed is {self.seed!r:.80}, expected an integer of 64 bits or None")
        if not self.target_modules:
            raise AdapterError("target_modules is empty: nothing would be adapted")
        _ = self.rule

    def _take(self, name: str, spelling: str, value: object) -> None:
        """Takes an option that is given as PEFT spells it."""
        if value is None:
            return
        if getattr(self, name) not in (getattr(type(self), name), value):
            raise AdapterError(f"{name} and {spelling} are one option: give one of them")
        object.__setattr__(self, name, value)

    @property
    def rule(self) -> TargetRule:
        """Which modules the adapter acts on."""
        return TargetRule(
            self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern
        )

    def make_generator(self) -> torch.Generator | None:
        """A generator seeded with ``seed``, to be shared by all updates, or None without a seed."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def fresh(
        self,
        path: str,
        shape: tuple[int, ...],
        layer: str = "linear",
        dtype: torch.dtype = torch.float32,
        weight: Weight | None = None,
        generator: torch.Generator | None = None,
        groups: int = 1,
    ) -> tuple[Update, torch.Tensor | None]:
        """Makes the update of one layer, without effect until it is trained.

        Args:
            path: dotted module path, looked up in the patterns.
            shape: (out, in, *kernel) of the layer, whatever way it stores its weight.
            layer: the name of a `lora_fx.layers.layer_types.LayerType`.
            dtype: of the new tensors.
            weight: gives the base weight in that shape; called by PiSSA and OLoRA alone.
            generator: source of the random values; None takes torch's global one.
            groups: of a convolution.

        Returns:
            The update: down (r, in, *kernel), up (out, r / groups); and the weight that must take
            the place of the base's, in that shape and in its dtype, or None.

        Raises:
            AdapterError: the layer cannot start this way; names it.
        """
        rank = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        scale = scale_of(alpha, rank, self.use_rslora)
        with within(path):
            made = initial(
                self.init, shape, rank, scale, layer, weight, generator, dtype=dtype, groups=groups
            )
        kind = "rslora" if self.use_rslora else "lora"
        stored = EMBEDDING if TYPES[layer].reads_ids else None
        return Update(made.down, made.up, scale, kind, stored=stored), made.residual


LoraConfig.__init__ = takes(AdapterError)(LoraConfig.__init__)  # type: ignore[method-assign]

__all__ = [
    "LoraConfig",
    "checked_alpha",
    "checked_alphas",
    "checked_rank",
    "checked_ranks",
    "scale_of",
]
