"""The types of layers: what calls them, how they store their tensors, how a branch runs beside.

Whoever asks something that hangs on the type of a layer asks here. A type that is registered from
outside is found in graphs, injected into and read back like these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.errors import TraceError
from lora_fx.graph.ops import aten, call_argument
from lora_fx.layers.axes import convert, shape_of

if TYPE_CHECKING:
    from lora_fx.layers.sites import Site

Call = tuple[Any, tuple[Any, ...]]
Spelling = Callable[[fx.Node], Call | None]

# The axes of what updates hold, whatever way a layer stores its own.
CANONICAL = {"weight": "out in *k", "down": "r in *k", "up": "out r", "vector": "n"}
# How a slot's file has them, of a layer without a kernel and of one with.
_FILED = {"down": ("in r", "r in *k"), "up": ("r out", "out r 1*")}
NORM = "norm"  # the kind of a module that no update of low rank acts on


@dataclass(frozen=True)
class Operands:
    """Where an operator takes its operands, by place.

    Attributes:
        x: what the layer reads.
        weight: what it multiplies with, as the layer stores it.
        bias: None where it has none.
        groups: of a convolution.
        unbiased: the operator to call in place of one that cannot do without a bias.
        folded: the operator of (x, W, b) to call in place of one that does more than to multiply
            with its weight, such as to scale the product; its type says how W is stored.
    """

    x: int = 0
    weight: int = 1
    bias: int | None = 2
    groups: int | None = None
    unbiased: Any = None
    folded: Any = None

    def of(
        self, arguments: tuple[Any, ...], x: fx.Node, weight: fx.Node, bias: fx.Node | None
    ) -> tuple[Any, ...]:
        """The arguments of the same call of other operands."""
        given = list(arguments)
        given += [None] * (1 + max(self.x, self.weight, self.bias or 0) - len(given))
        given[self.x], given[self.weight] = x, weight
        if self.bias is not None:
            given[self.bias] = bias
        while given[-1] is None:
            given.pop()
        return tuple(given)


def by_product(site: Site, x: fx.Node, down: fx.Node) -> Call:
    """X -> r features, along the axis that has them."""
    if site.labels is not None:
        return aten.einsum.default, (site.labels.shrink(), [x, down])
    return aten.matmul.default, (x, down)


def back_by_product(site: Site, h: fx.Node, up: fx.Node, groups: int) -> Call:
    """R features -> the layer's outputs."""
    if site.labels is not None:
        return aten.einsum.default, (site.labels.expand(), [h, up])
    return aten.matmul.default, (h, up)


def by_lookup(site: Site, x: fx.Node, down: fx.Node) -> Call:
    """Ids -> r features."""
    return aten.embedding.default, (down, x)


def by_geometry(site: Site, x: fx.Node, down: fx.Node) -> Call:
    """X -> r channels, by the layer's own stride, padding and dilation, over all of its inputs."""
    place = operands_of(site.node.target).groups
    before, behind = site.node.args[3:place], site.node.args[place:][1:]
    return site.node.target, (x, down, None, *before, *((1, *behind) if behind else ()))


def by_points(site: Site, h: fx.Node, up: fx.Node, groups: int) -> Call:
    """R channels -> the layer's, point by point."""
    dims = site.type.kernel
    unit = (h, up, None, [1] * dims, [0] * dims, [1] * dims, groups)
    return _POINTS[dims], unit if groups > 1 else unit[:3]


_POINTS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerType:
    """One type of layer.

    Its weight is of (out, in, *kernel) to an update, ``down`` of (r, in, *kernel) and ``up`` of
    (out, r): ``W' = W + scale * up @ down``. The axis strings say how the layer stores them. Where
    there are groups, its weight is that of each group, one below the other along the first axis.

    Attributes:
        name: ``"linear"``, ``"conv2d"``, ...: the ``kind`` of a `Layer`.
        operators: the operators that call it.
        classes: its modules.
        functions: functions of Python that call it -> how that is said by an operator.
        kernel: how many axes its kernel has.
        weight: how the layer stores its weight.
        down: how a branch stores what ``shrink`` multiplies with.
        up: how a branch stores what ``expand`` multiplies with.
        vector: how a vector of features is stored.
        is_linear: whether it is ``x @ W.T + b`` and nothing else.
        reads_ids: whether it looks up rows of a table.
        in_files: whether PEFT, LyCORIS or loralib write updates of it; a name that means such a
            layer is refused where not, since nobody says what the tensors are.
        shrink: call, x and down -> the call that gives r features.
        expand: call, r features, up and groups -> the call that gives the layer's outputs.
    """

    name: str
    operators: Mapping[Any, Operands]
    classes: tuple[type[nn.Module], ...] = ()
    functions: Mapping[Any, Spelling] = field(default_factory=dict)
    kernel: int = 0
    weight: str = "out in *k"
    down: str = "in r"
    up: str = "r out"
    vector: str = "n"
    is_linear: bool = False
    reads_ids: bool = False
    in_files: bool = True
    shrink: Callable[[Site, fx.Node, fx.Node], Call] = by_product
    expand: Callable[[Site, fx.Node, fx.Node, int], Call] = back_by_product

    def __post_init__(self) -> None:
        """Checks the axes.

        Raises:
            TraceError: a string lacks an axis or has one too many.
        """
        for role, axes in CANONICAL.items():
            found: str = getattr(self, role)
            own, wanted = ({n for n in each.split() if "*" not in n} for each in (found, axes))
            if own != wanted:
                raise TraceError(
                    f"layer type {self.name!r}: {role} is {found!r}, expected the axes of "
                    f"{axes!r} in any order"
                )

    @cached_property
    def transposed(self) -> bool:
        """Whether the weight is stored with its inputs first."""
        return self.weight.startswith("in")

    def axis(self, role: str, name: str) -> int:
        """Where a tensor has an axis."""
        return getattr(self, role).split().index(name)  # type: ignore[no-any-return]

    def leaf(self, role: str) -> str:
        """What a slot's file calls a factor: ``At`` and ``Bt`` have their axes in other order."""
        usual = _FILED[role][self.kernel > 0]
        return {"down": "A", "up": "B"}[role] + ("" if getattr(self, role) == usual else "t")

    def shape(
        self, role: str, sizes: Mapping[str, int | None], kernel: tuple[int, ...]
    ) -> tuple[int | None, ...]:
        """The stored shape of a tensor, from the size of each axis."""
        return shape_of(getattr(self, role), sizes, kernel)

    def canonical(self, role: str, tensor: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """A stored tensor as updates have it; a view, unless it is of several groups."""
        return self._converted(tensor, getattr(self, role), CANONICAL[role], groups)

    def store(self, role: str, tensor: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """The reverse of `canonical`."""
        return self._converted(tensor, CANONICAL[role], getattr(self, role), groups)

    def _converted(self, tensor: torch.Tensor, have: str, want: str, groups: int) -> torch.Tensor:
        if have == want:
            return tensor
        parts = tensor.chunk(groups) if groups > 1 else (tensor,)
        made = [convert(part, have, want, self.kernel) for part in parts]
        return torch.cat(made) if groups > 1 else made[0]

    def canonical_shape(self, stored: tuple[int, ...], groups: int = 1) -> tuple[int, ...]:
        """(out, in / groups, *kernel) of a weight, from its stored shape, and the reverse."""
        first, second, *kernel = stored
        return (second * groups, first // groups, *kernel) if self.transposed else tuple(stored)


TYPES: dict[str, LayerType] = {}
OPERATORS: dict[Any, LayerType] = {}


def register(layer: LayerType) -> LayerType:
    """Makes a type of layer known.

    Fold asks `lora_fx.affine.transfer.TRANSFER` besides, by the operator's name: without a
    transfer function there, branches stay beside the layer.

    Raises:
        TraceError: another type has this name, or one of its operators.
    """
    taken = [*({layer.name} & TYPES.keys()), *(layer.operators.keys() & OPERATORS.keys())]
    if taken:
        raise TraceError(f"layer type {layer.name!r}: {taken[0]} is registered already")
    TYPES[layer.name] = layer
    OPERATORS.update(dict.fromkeys(layer.operators, layer))
    return layer


def operands_of(target: Any) -> Operands:
    """Where a registered operator takes its operands."""
    return OPERATORS[target].operators[target]


def spelling_of(node: fx.Node) -> Call | None:
    """A call of a layer's function in the words of its operator, or None if it is none."""
    for layer in TYPES.values():
        if node.target in layer.functions:
            return layer.functions[node.target](node)
    is_packet = isinstance(node.target, torch._ops.OpOverloadPacket)  # as Python calls it
    found = getattr(node.target, "default", None) if is_packet else node.target
    if found in OPERATORS and (found is not node.target or node.kwargs):
        return by_schema(found, node)
    return None


def by_schema(target: Any, node: fx.Node) -> Call:
    """The arguments by place, however they were given: a number for several axes is a list."""
    given: list[Any] = []
    for place, known in enumerate(target._schema.arguments):
        if known.kwarg_only:  # they stay what they are
            break
        value = call_argument(node, place, known.name, known.default_value)
        if str(known.type) == "List[int]" and not isinstance(value, fx.Node):
            value = [value] * (known.N or 1) if isinstance(value, int) else list(value)
        given.append(value)
    while given and given[-1] is None:
        given.pop()
    return target, tuple(given)


def _embedding(node: fx.Node) -> Call | None:
    if call_argument(node, 3, "max_norm") is not None:
        return None  # renormalises its table in place: not a function of its inputs
    ids, table = call_argument(node, 0, "input"), call_argument(node, 1, "weight")
    padding = call_argument(node, 2, "padding_idx")
    return aten.embedding.default, (table, ids, -1 if padding is None else padding)


def _conv(dims: int) -> LayerType:
    """A convolution; A has its kernel and its geometry, B is one of single points."""
    name = f"conv{dims}d"
    packet = getattr(aten, name)

    def spelled(node: fx.Node) -> Call:
        is_named = isinstance(call_argument(node, 4, "padding"), str)  # "same" or "valid"
        return by_schema(packet.padding if is_named else packet.default, node)

    return LayerType(
        name=name,
        operators=dict.fromkeys((packet.default, packet.padding), Operands(groups=6)),
        classes=(getattr(nn, f"Conv{dims}d"),),
        functions=dict.fromkeys((getattr(torch, name), packet), spelled),
        kernel=dims,
        down="r in *k",
        up="out r 1*",
        vector="n 1*",
        shrink=by_geometry,
        expand=by_points,
    )


def _conv_transpose(dims: int) -> LayerType:
    """A transposed convolution, whose weight is of (in, out / groups, *kernel).

    PEFT has no LoRA of it; this one is defined by the weight form, over the outputs as that of a
    convolution: A is a transposed convolution of the layer's own kernel and geometry that gives r
    channels, and B one of single points, so that together they have the kernel ``up @ down`` with
    down of (r, in, *kernel) and up of (out, r). Beside groups A reads all inputs, and B has groups.
    """
    name = f"conv_transpose{dims}d"
    packet = getattr(aten, name)
    operator = packet.default if dims == 1 else packet.input
    return LayerType(
        name=name,
        operators={operator: Operands(groups=6)},
        classes=(getattr(nn, f"ConvTranspose{dims}d"),),
        functions=dict.fromkeys(
            (getattr(torch, name), packet), lambda node: by_schema(operator, node)
        ),
        kernel=dims,
        weight="in out *k",
        down="in r *k",
        up="out r 1*",
        vector="n 1*",
        in_files=False,
        shrink=by_geometry,
        expand=by_points,
    )


LINEAR = register(
    LayerType(
        name="linear",
        operators={aten.linear.default: Operands()},
        classes=(nn.Linear,),
        functions={F.linear: lambda node: by_schema(aten.linear.default, node)},
        is_linear=True,
    )
)
register(
    LayerType(  # transformers' Conv1D, which `layer_of` tells by its name
        name="linear_transposed",
        operators={
            aten.addmm.default: Operands(x=1, weight=2, bias=0, unbiased=aten.linear.default)
        },
        weight="in out",
        is_linear=True,
    )
)
register(
    LayerType(
        name="embedding",
        operators={aten.embedding.default: Operands(x=1, weight=0, bias=None)},
        classes=(nn.Embedding,),
        functions={F.embedding: _embedding},
        weight="in out",
        reads_ids=True,
        shrink=by_lookup,
    )
)
for _dims in (1, 2, 3):
    register(_conv(_dims))
for _dims in (1, 2, 3):
    register(_conv_transpose(_dims))
