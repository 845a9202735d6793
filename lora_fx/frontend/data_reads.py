"""``tensor.data``, ``len``, ``int``, repeats and buffers, read so that a tracer sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fx.graph.graph_module import shallow_clone

_DATA: Any = torch._C.TensorBase.data


@contextmanager
def data_detached() -> Iterator[None]:
    """Lets ``tensor.data`` be ``tensor.detach()``: the same memory, by a call that is recorded.

    A tensor that ``.data`` gives is of no graph: torch.export takes it for a constant that it has
    never seen. What is set by ``tensor.data = value`` is set as ever.
    """
    torch.Tensor.data = property(  # type: ignore[assignment]
        lambda tensor: tensor.detach(), lambda tensor, value: _DATA.__set__(tensor, value)
    )
    try:
        yield
    finally:
        del torch.Tensor.data


@contextmanager
def lengths_free(model: nn.Module) -> Iterator[None]:
    """Lets ``len(tensor)`` be ``tensor.shape[0]`` in the files that hold the code of a model.

    Python makes an int of what ``len`` gives, and torch.export takes a free size for a constant.
    """
    with _called(model, {"len": _length}):
        yield


@contextmanager
def numbers_free(model: nn.Module) -> Iterator[None]:
    """Lets ``int`` and ``float`` keep a number that a tracer leaves open.

    In the files that hold the code of a model, as in ``int(x.shape[1] * 0.5)`` of a free size, and
    ``int(lengths.max())`` of what a tensor holds. For models that cannot be traced otherwise:
    torch takes no other ``int`` for a dtype.
    """
    with _called(model, {"int": _Int, "float": _Float}), _repeats_free():
        yield


@dataclass(frozen=True)
class _Repeated:
    items: list[Any]
    size: torch.SymInt


@contextmanager
def _repeats_free() -> Iterator[None]:
    """Lets ``torch.tensor([0] * size)`` be of a free size, of which Python makes an int to repeat.

    For what else a list is repeated, there is nothing here, and what asks for it fails.
    """
    times: Any = torch.SymInt.__rmul__
    make = torch.tensor

    def repeated(size: torch.SymInt, other: Any) -> Any:
        return _Repeated(other, size) if isinstance(other, list) else times(size, other)

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(data, _Repeated):
            return make(data, *args, **kwargs)
        made = make(data.items, *args, **kwargs)
        return made.repeat(data.size, *[1 for _ in made.shape[1:]])

    torch.SymInt.__rmul__ = repeated  # type: ignore[method-assign]
    torch.tensor = tensor
    try:
        yield
    finally:
        torch.SymInt.__rmul__ = times  # type: ignore[method-assign]
        torch.tensor = make


@contextmanager
def _called(model: nn.Module, names: Mapping[str, Any]) -> Iterator[None]:
    """Gives names of Python's own another meaning in the files that hold the code of a model."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    files = {kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] != "torch"}
    spaces = [vars(sys.modules[file]) for file in files if file in sys.modules]
    placed = [(space, name) for space in spaces for name in names if name not in space]
    for space, name in placed:
        space[name] = names[name]
    try:
        yield
    finally:
        for space, name in placed:
            del space[name]


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)


class _Kept(type):
    """A type of Python's numbers, called and asked for as that is, which keeps torch's symbols."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        value = next(iter(args), None)
        value = value.item() if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return cls.kept(value)  # type: ignore[attr-defined]
        return cls.__base__(*args, **kwargs)  # type: ignore[misc]

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__base__)  # type: ignore[arg-type]

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


class _Int(int, metaclass=_Kept):
    kept = staticmethod(torch.sym_int)


class _Float(float, metaclass=_Kept):
    kept = staticmethod(torch.sym_float)


class KnownCounts:
    """A shell of a model in which a buffer of one number is a number that a tracer knows.

    torch.export knows what a tensor made in the model's code holds, and not what a buffer holds:
    a size that is computed from one (the paddings of EnCodec and Mimi) would be unknown, too, and
    a flag (whether a codebook was made yet) could not be branched on.

    Attributes:
        model: the shell.
        names: of the buffers; nothing if there are none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = shallow_clone(model)
        self.names: list[str] = []
        self._given: list[tuple[torch.Tensor, int]] = []
        for path, module in self.model.named_modules():
            own = {name: b for name, b in module._buffers.items() if b is not None and _counts(b)}
            if own and not type(module).__module__.startswith("torch."):  # batch-norm counts calls
                self.names += [f"{path}.{name}".lstrip(".") for name in own]
                self._make_known(module, own)

    @property
    def is_written(self) -> bool:
        """Whether the model's code has written to one of them: no constant then."""
        return any(tensor._version != version for tensor, version in self._given)

    def _make_known(self, module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
        for name, buffer in buffers.items():
            del module._buffers[name]
            setattr(module.__class__, name, property(partial(self._read, buffer)))

    def _read(self, buffer: torch.Tensor, module: nn.Module) -> torch.Tensor:
        made = torch.tensor(buffer.tolist(), dtype=buffer.dtype)
        self._given.append((made, made._version))
        return made


def _counts(buffer: torch.Tensor) -> bool:
    return buffer.numel() == 1 and not buffer.is_sparse
