"""Slots: what of a swappable model an adapter may bring, and the graph inputs that take it."""

from __future__ import annotations

from dataclasses import Field, dataclass
from math import prod
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import torch

from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import TYPES

TENSOR, EXPERTS = "tensor", "experts"
INVOCATION: Final = "invocation"


class Input(NamedTuple):
    """A graph input of a slot.

    Attributes:
        name: ``<module path>.lora_A`` and its kin, or that of a parameter.
        shape: None where the rank goes.
    """

    name: str
    shape: tuple[int | None, ...]

    def sized(self, rank: int) -> tuple[int, ...]:
        """The shape at a rank."""
        return tuple(rank if size is None else size for size in self.shape)


class AnySlot(Protocol):
    """What every slot has.

    Attributes:
        path: of the module or the parameter that an adapter acts on.
        kind: of the layer, as `lora_fx.layers.layer.Layer` says; ``"tensor"`` or ``"experts"``.
        dtype: of what goes in: ``"float32"``.
        digest: of the base's tensor, its dtype, shape and bytes.
        may_lack: whether an adapter file may leave it out, which leaves the base as it is.
        is_ours: whether the file says itself what it is of.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    path: str
    kind: str
    dtype: str
    digest: str
    may_lack: ClassVar[bool] = False
    is_ours: ClassVar[bool] = True

    @property
    def inputs(self) -> dict[str, Input]:
        """The graph inputs, by what goes in: ``down``, ``up``, a vector, or ``tensor``."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """The names of its graph inputs."""
        return [value.name for value in self.inputs.values()]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of torch."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def neutral(self) -> dict[str, torch.Tensor]:
        """What has no effect, by input name: zeros of no rank, or no tokens."""
        shapes = {value.name: value.sized(0) for value in self.inputs.values()}
        return {name: torch.zeros(shape, dtype=self.torch_dtype) for name, shape in shapes.items()}

    def as_input(self, part: str, value: torch.Tensor) -> torch.Tensor:
        """What goes in at a part, as the graph takes it."""
        return value

    def from_input(self, part: str, value: torch.Tensor) -> torch.Tensor:
        """The reverse of `as_input`, with all that the graph does to it."""
        return value

    def rank_of(self, down: torch.Tensor) -> int:
        """The rank of what goes in at ``down``."""
        return down.shape[self.inputs["down"].shape.index(None)]

    def is_sound(self) -> bool:
        """Whether a file could have it: a known kind, sizes that are sizes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Slot(AnySlot):
    """A layer that an adapter's factors stand beside.

    Attributes:
        path: module path of the layer.
        kind: of the layer, as `lora_fx.layers.layer.Layer` says.
        in_features: that A sums over; of an embedding, how many rows it has.
        out_features: that B gives.
        dtype: of what goes in: ``"float32"``.
        kernel: of a convolution, else empty.
        vectors: whether it takes those of DoRA and (IA)3 as well.
        digest: of the weight that the slot stands beside.
        bias_digest: of the layer's bias, or ``""``.
        groups: of a convolution, whose factors mix them: A reads all inputs.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    dtype: str
    kernel: tuple[int, ...] = ()
    vectors: bool = False
    digest: str = ""
    bias_digest: str = ""
    groups: int = 1

    @property
    def layer(self) -> Layer:
        """What an update needs to know of it."""
        shape = (self.out_features, self.in_features, *self.kernel)
        return Layer(
            path=self.path, kind=self.kind, shape=shape, dtype=self.torch_dtype, groups=self.groups
        )

    @property
    def inputs(self) -> dict[str, Input]:
        """The graph inputs, by the names of `BranchTensors`: A, B, and vectors if any."""
        stored = TYPES[self.kind]
        sizes = {"out": self.out_features, "in": self.in_features, "r": None}
        found = {
            (role, stored.leaf(role)): stored.shape(role, sizes, self.kernel)
            for role in ("down", "up")
        }
        along = {"gain": "out", "bias": "out"}
        if not stored.reads_ids and prod((self.in_features, *self.kernel)) > 1:
            along["col"] = "in"  # the factor of the only number that it reads is one of its rows
        for name, axis in along.items() if self.vectors else ():
            shape = stored.shape("vector", {"n": sizes[axis]}, self.kernel)
            found[name, name] = shape
        return {part: Input(f"{self.path}.lora_{n}", shape) for (part, n), shape in found.items()}

    def neutral(self) -> dict[str, torch.Tensor]:
        """What has no effect, by input name: no rank, gains and biases of zero, columns of one.

        A convolution gets zeros of rank 1: there are versions of onnxruntime (1.31) whose
        convolutions leave the result of no channels as the memory was.
        """
        dtype, rank = self.torch_dtype, 1 if self.kernel else 0
        make = {"col": torch.ones}
        return {
            value.name: make.get(part, torch.zeros)(value.sized(rank), dtype=dtype)
            for part, value in self.inputs.items()
        }

    def is_sound(self) -> bool:
        """Whether the layer is of a type with such a kernel, and every size is positive."""
        sizes = (self.in_features, self.out_features, *self.kernel, self.groups)
        return self.kind in TYPES and _are_sizes(sizes)


@dataclass(frozen=True)
class TensorSlot(AnySlot):
    """A parameter that an adapter may bring whole: a head, a norm, a bias, a weight made anew.

    The input has the parameter's name and the base's tensor as its default.

    Attributes:
        path: its name.
        shape: as the model stores it.
        dtype: of its values.
        digest: of the base's tensor.
        layer_path: of the layer that it is the weight of, if any, or ``""``.
        layer_kind: of that layer.
        groups: of that layer.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    digest: str = ""
    layer_path: str = ""
    layer_kind: str = ""
    groups: int = 1
    kind: str = TENSOR
    may_lack = True

    @property
    def layer(self) -> Layer | None:
        """The layer that it is the weight of, if any."""
        if not self.layer_path:
            return None
        out, into, *kernel = TYPES[self.layer_kind].canonical_shape(self.shape, self.groups)
        shape = out, into * self.groups, *kernel
        return Layer(
            path=self.layer_path, kind=self.layer_kind, shape=shape, dtype=self.torch_dtype,
            groups=self.groups,
        )  # fmt: skip

    @property
    def inputs(self) -> dict[str, Input]:
        """The parameter, by its own name."""
        return {TENSOR: Input(self.path, self.shape)}

    def neutral(self) -> dict[str, torch.Tensor]:
        """The base's own, which the file has."""
        return {}

    def is_sound(self) -> bool:
        """Whether every size is positive, and the layer of a type with such a weight."""
        known = TYPES.get(self.layer_kind)
        fits = known is not None and len(self.shape) == 2 + known.kernel
        return _are_sizes((*self.shape, self.groups)) and (fits or not self.layer_path)


@dataclass(frozen=True)
class ExpertSlot(AnySlot):
    """A parameter of one matrix, or one for each expert: W[e] + B[e] @ A[e], computed at each run.

    Attributes:
        path: the parameter's name.
        shape: (rows, columns) or (experts, rows, columns), as the model stores it.
        dtype: of its values.
        digest: of the base's tensor.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    digest: str = ""
    kind: str = EXPERTS

    @property
    def inputs(self) -> dict[str, Input]:
        """A (r, columns) and B (rows, r), with the experts before them if there are such."""
        *experts, rows, columns = self.shape
        return {
            "down": Input(f"{self.path}.lora_A_experts", (*experts, None, columns)),
            "up": Input(f"{self.path}.lora_B_experts", (*experts, rows, None)),
        }

    def is_sound(self) -> bool:
        """Whether there are two or three positive sizes."""
        return len(self.shape) in (2, 3) and _are_sizes(self.shape)


@dataclass(frozen=True)
class InvocationSlot(AnySlot):
    """The tokens from whose last occurrence on the factors beside linear layers act: aLoRA.

    Attributes:
        path: the graph's input of ids, which they are looked for in.
    """

    path: str
    kind: str = INVOCATION
    dtype: str = "int64"
    digest: str = ""

    @property
    def inputs(self) -> dict[str, Input]:
        """The tokens, (n,); of none, factors act everywhere."""
        return {INVOCATION: Input(f"{self.path}.lora_invocation", (None,))}

    def is_sound(self) -> bool:
        """Whether it is of whole numbers."""
        return self.dtype == "int64"


def class_of(kind: Any) -> type[AnySlot]:
    """The class of the slots of a kind."""
    named: dict[Any, type[AnySlot]] = {
        TENSOR: TensorSlot,
        EXPERTS: ExpertSlot,
        INVOCATION: InvocationSlot,
    }
    return named.get(kind, Slot) if isinstance(kind, str) else Slot


def _are_sizes(sizes: tuple[Any, ...]) -> bool:
    return all(type(size) is int and size > 0 for size in sizes)
