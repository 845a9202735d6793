"""Why paths of an adapter mean nothing in a graph: how they differ from those that it has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

_INNER = ".base_layer"  # what PEFT calls the layer that it wraps
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def cause(unknown: Sequence[str], paths: Sequence[str], model: str) -> str:
    """A sentence for each cause that can be told; "" where none can.

    Args:
        unknown: paths of an adapter's layers and parameters that match nothing.
        paths: of the graph's layers.
        model: what was traced, by the name of its class.
    """
    wrapped = _wrapped(unknown, paths)
    if wrapped:
        return f" {wrapped}"
    told = [_deeper(unknown, paths), _apart(unknown, paths), _lacking(unknown, paths, model)]
    return "".join(f" {text}" for text in told if text)


def _wrapped(unknown: Sequence[str], paths: Sequence[str]) -> str | None:
    """A model that PEFT has wrapped before it was traced: each layer lies in one of PEFT's."""
    inner = [path.removesuffix(_INNER) for path in paths if path.endswith(_INNER)]
    if not any(end in unknown for path in inner for end in _ends(path)):
        return None
    return (
        f"PEFT has wrapped {inner[0]} already, whose own layer is {inner[0]}{_INNER}: trace the "
        "model as it was before (PeftModel.unload()), or export the graph without injecting."
    )


def _deeper(unknown: Sequence[str], paths: Sequence[str]) -> str | None:
    """A model of fewer layers: the paths are alike, up to a number that is too high."""
    known = {_alike(path): path for path in sorted(paths, key=_numbers)}
    alike = [path for path in unknown if _alike(path) in known]
    deep = [path for path in alike if _numbers(path) > _numbers(known[_alike(path)])]
    if not deep:
        return None
    last = max(deep, key=_numbers)
    return (
        f"The adapter is of a model of more layers: it has {last}, and the graph ends with "
        f"{known[_alike(last)]}: give the base that it was trained on."
    )


def _apart(unknown: Sequence[str], paths: Sequence[str]) -> str | None:
    """A wrapper, or a part that was moved: the paths end alike and begin otherwise."""
    ends = {end: path for path in paths for end in _ends(path)}
    known = {_alike(path) for path in paths}
    pairs: Counter[tuple[str, str]] = Counter()
    for path in unknown:
        end = next((end for end in _ends(path) if end in ends), None)
        if (
            end is not None
            and _alike(path) not in known
            and ("." in end or end in (path, ends[end]))
        ):
            pairs[path.removesuffix(end), ends[end].removesuffix(end)] += 1
    if not pairs:
        return None
    [((ours, theirs), count)] = pairs.most_common(1)
    if ours and theirs:
        return (
            f"{count} of them begin with {ours!r} where the graph's layers begin with {theirs!r}: "
            "a part was moved, or is of another class of model: trace the one that the adapter was "
            "made for."
        )
    return (
        f"The paths differ by {ours or theirs!r}: trace the module that the adapter was made for."
    )


def _lacking(unknown: Sequence[str], paths: Sequence[str], model: str) -> str | None:
    """A model of another class, such as one without a head: nothing in it has such a name."""
    known = {part for path in paths for part in path.split(".")}
    names = (re.sub(r"\.(weight|bias)$", "", path).rpartition(".")[2] for path in unknown)
    absent = [name for name in dict.fromkeys(names) if name not in known]
    if not absent:
        return None
    return (
        f"A {model} computes nothing that is called {' or '.join(absent[:3])}: the adapter is of a "
        "model of another class, such as the one with a head around it."
    )


def _alike(path: str) -> str:
    return _NUMBER.sub("N", path)


def _numbers(path: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(path)]


def _ends(path: str) -> Iterator[str]:
    """The path and its ends after a dot, the longest first."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))
