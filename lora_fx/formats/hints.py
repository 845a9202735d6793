"""What a caller knows of an adapter and its format does not store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hints:
    """Options of ``load_adapter`` that only some formats take.

    Attributes:
        strict: refuse what is suspicious; False turns it into an ``AdapterWarning``.
        allow_pickle: read a ``.bin``, with ``torch.load(weights_only=True)`` alone.
    """

    strict: bool = True
    allow_pickle: bool = False
