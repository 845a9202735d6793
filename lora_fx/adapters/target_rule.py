"""Which modules an adapter means: PEFT's target rules, for any path asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from lora_fx.adapters.safe_regex import NAME, BoundedRegex, check_regexes, compile_bounded
from lora_fx.errors import AdapterError

T = TypeVar("T")

ALL_LINEAR = "all-linear"
# The lazy start finds the first numbered segment: in layers.1.experts.0 the layer, not the expert.
_ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."


@dataclass(frozen=True)
class TargetRule:
    """PEFT's selection of modules by path (``check_target_module_exists`` of PEFT 0.21).

    Attributes:
        target_modules: a list of names (the path, or its end after a dot), a regex that must match
            the whole path, or ``"all-linear"``, which matches every path it is asked about.
        exclude_modules: a list of names or a regex, matched the same way; wins over the above.
        layers_to_transform: with a list of names, only paths with one of these layer indices, or
            listed whole.
        layers_pattern: regexes of the segment before the layer index; empty means any segment.
        saved_modules: PEFT's ``modules_to_save``; they and what is inside them are never matched.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    saved_modules: Sequence[str] = ()
    _targets: frozenset[str] = field(init=False, repr=False, compare=False)
    _excluded: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Closes the sequences and refuses a rule that PEFT would not run.

        Raises:
            AdapterError: a field of the wrong type, a malformed regex, or layers of a regex.
        """
        indices = _indices(self.layers_to_transform)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "saved_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "layers_to_transform", indices or None)
        object.__setattr__(self, "_targets", _as_set(self.target_modules))
        object.__setattr__(self, "_excluded", _as_set(self.exclude_modules))
        self._check_regexes()

    def _check_regexes(self) -> None:
        """Compiles every regex once, so that a bad one is refused before any path is asked."""
        if isinstance(self.target_modules, str):
            if self.layers_to_transform or self.layers_pattern:
                raise AdapterError(
                    "layers_to_transform and layers_pattern need target_modules to be a list of "
                    f"names, found {self.target_modules!r}"
                )
            compile_bounded(self.target_modules, "target_modules")
        if isinstance(self.exclude_modules, str):
            compile_bounded(self.exclude_modules, "exclude_modules")
        if self.layers_pattern and not self.layers_to_transform:
            raise AdapterError("layers_pattern is given without layers_to_transform")
        check_regexes(self.layers_pattern, "layers_pattern")
        check_regexes(self.saved_modules, "modules_to_save")

    def matches(self, path: str) -> bool:
        """Whether the rule selects the module at a path.

        Args:
            path: dotted module path. Under ``"all-linear"`` the caller asks about linear layers
                only, and not about the output embedding.

        Raises:
            SlowRegexError: a regex of the rule is not done in time.
        """
        if self._is_excluded(path) or self._is_saved(path):
            return False
        if isinstance(self.target_modules, str):
            pattern = compile_bounded(self.target_modules, "target_modules")
            return self.is_all_linear or pattern.fullmatch(path) is not None
        # As in PEFT, a name that is the whole path is meant whatever its layer.
        by_end = _ends_in(path, self._targets) and self._is_in_layers(path)
        return path in self._targets or by_end

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are the shorthand for every linear layer, in any case as in PEFT."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _is_excluded(self, path: str) -> bool:
        if not isinstance(self.exclude_modules, str):
            return _ends_in(path, self._excluded)
        pattern = compile_bounded(self.exclude_modules, "exclude_modules")
        return bool(self.exclude_modules) and pattern.fullmatch(path) is not None

    def _is_saved(self, path: str) -> bool:
        patterns = (rf"(^|.*\.){name}($|\..*)" for name in self.saved_modules)
        return any(_wrapped(pattern).match(path) for pattern in patterns)

    def _is_in_layers(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in self.layers_pattern]
        found = (_wrapped(pattern).match(path) for pattern in patterns or [_ANY_LAYER])
        first = next((match for match in found if match), None)
        indices = self.layers_to_transform
        return first is not None and isinstance(indices, tuple) and int(first["index"]) in indices


def saved_module(path: str, modules: Sequence[str]) -> str | None:
    """The first module on the way to a path that ``modules_to_save`` means, as PEFT matches it.

    PEFT compares ends without asking for a dot: ``head`` means ``lm_head`` too.
    """
    parts = path.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((p for p in prefixes if p.endswith(tuple(modules))), None)


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """Looks a path up in PEFT's ``rank_pattern`` or ``alpha_pattern``: the first key that matches.

    Args:
        patterns: regex of the path, or of its end after a dot -> value.
        path: dotted module path.
        default: what a path has that no key matches.
    """
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)


def pattern_matches(key: str, path: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means the module at a path."""
    name = NAME.fullmatch(key)
    if name is None:
        return _key_regex(key).match(path) is not None
    # Most keys are names, of which there may be as many as layers: no regex is made of them.
    text = name[2].replace("\\.", "\0")
    before, tail = path[: -len(text)], path[-len(text) :]
    begins = not before if name[1] else before[-1:] in ("", ".")
    return begins and len(tail) == len(text) and all(map(_fits, text, tail))


def _fits(one: str, other: str) -> bool:
    return one in (".", other) or (one == "\0" and other == ".")


@lru_cache(maxsize=65536)
def _key_regex(key: str) -> BoundedRegex:
    compile_bounded(key, "rank_pattern or alpha_pattern")
    return _wrapped(rf"(.*\.)?({key})$")


def _wrapped(pattern: str) -> BoundedRegex:
    """Compiles a regex inside the frame that PEFT puts around it."""
    return compile_bounded(pattern, "as PEFT builds it")


def _ends_in(path: str, names: frozenset[str]) -> bool:
    """Whether a path, or its end after some dot, is one of the names; independent of how many."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _names(field_name: str, value: object) -> str | tuple[str, ...]:
    """A field as a regex or a closed tuple of names."""
    if isinstance(value, str) and field_name in ("target_modules", "exclude_modules"):
        return value
    if isinstance(value, str) and field_name == "layers_pattern":
        return (value,) if value else ()
    if value is None and field_name != "target_modules":
        return ()
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise AdapterError(f"{field_name} is {value!r:.80}, expected a list of names")
    if not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{field_name} is {value!r:.80}, expected a list of names")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _indices(value: object) -> tuple[int, ...]:
    """The field layers_to_transform as a closed tuple; empty means every layer."""
    if value is None:
        return ()
    indices = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(type(index) is not int for index in indices):
        raise AdapterError(f"layers_to_transform is {value!r:.80}, expected layer indices")
    return indices


def _as_set(names: str | Sequence[str]) -> frozenset[str]:
    return frozenset() if isinstance(names, str) else frozenset(names)
