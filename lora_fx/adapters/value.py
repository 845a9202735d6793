"""A value: a frozen dataclass that can be copied and pickled, whatever mappings it closed."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType
from typing import Any, ClassVar


class Value:
    """Made anew of its fields; a closed mapping, which Python does not pickle, as a dictionary."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __reduce__(self) -> tuple[Any, ...]:
        """What `pickle` and `copy` make another of."""
        held = (getattr(self, field.name) for field in fields(self))
        return type(self), tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in held)
