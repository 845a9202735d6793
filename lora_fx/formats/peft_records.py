"""The fields that each of PEFT's configs has alone, with PEFT's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NoOptions:
    """A type whose config says no more than any other's."""


@dataclass(frozen=True)
class LohaOptions:
    """Fields of a LoHa config, with PEFT's defaults."""

    use_effective_conv2d: bool = False


@dataclass(frozen=True)
class LokrOptions:
    """Fields of a LoKr config, with PEFT's defaults."""

    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1


@dataclass(frozen=True)
class VeraOptions:
    """Fields of a VeRA config, with PEFT's defaults."""

    save_projection: bool = True
    projection_prng_key: int = 0


@dataclass(frozen=True)
class Ia3Options:
    """Fields of an (IA)3 config: None where PEFT chooses by the type of the model."""

    feedforward_modules: Any = None


@dataclass(frozen=True)
class OftOptions:
    """Fields of an OFT config, with PEFT's defaults."""

    r: int = 0
    oft_block_size: int = 32
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5


@dataclass(frozen=True)
class TokenOptions:
    """Fields of a config of trainable tokens."""

    token_indices: list[int] = field(default_factory=list)
