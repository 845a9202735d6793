"""Affine functions between nodes, as chains of links.

An `AffineMap` is an affine function of its parent, which is an AffineMap itself, and so on up to a
source: the chain holds the points that every path from the source runs through. A source is a node
and a way to read it: its features as they are, one-hot for a lookup, or in patches for a
convolution. So a table and a kernel are matrices like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import fx

from lora_fx.affine.feature_layout import Layout
from lora_fx.algebra.index_expr import Index
from lora_fx.algebra.matrix_expr import Identity, Matrix, product, rows, scaled, total


@dataclass(frozen=True)
class OneHot:
    """Reads ids as vectors of zeros with one 1: what a lookup multiplies its table with."""


@dataclass(frozen=True)
class Patches:
    """Reads what a convolution multiplies its kernel with, at every place the kernel visits.

    A row of a grouped kernel reads the channels of its group: such kernels can be scaled and
    added like matrices, but their rows can not be mixed. A transposed convolution reads, at each
    place of its result, what it spreads to there: ``extra`` is its output_padding, else None.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    extra: tuple[int, ...] | None = None


Reading = OneHot | Patches | None


class Link(Enum):
    """What an AffineMap's node does to its parent.

    Glue belongs to the link that it acts on, unless that is of moves; moves are links of their
    own, so that what is in front of them can be a source.
    """

    LAYER = "layer"  # one call of a layer, which has a path of its own
    JOIN = "join"  # several paths come together
    PRODUCT = "product"  # multiplies with a matrix that is no layer
    GLUE = "glue"  # scales or shifts
    VIEW = "move"  # reshapes, permutes, casts


@dataclass(frozen=True)
class ScaleShift:
    """A node that scales or shifts, and those before it."""

    node: fx.Node
    earlier: ScaleShift | None


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``node = weight @ parent + bias`` along the features.

    Attributes:
        node: whose value this is.
        parent: the AffineMap of the node that it is a function of; None for a source.
        weight: (out, in).
        layout: where the node keeps its features.
        bias: (out, 1), or None for zero.
        dtype: of the node; None if not known.
        link: the kind of the link to the parent.
        start: the node that the link starts with.
        last: what the node itself does.
        glue: what scales or shifts in this link, the last one first.
        reading: of a source.
        depth: how many links away the source is.
        root: that source; None for a source.
    """

    node: fx.Node
    parent: AffineMap | None
    weight: Matrix
    layout: Layout
    bias: Matrix | None = None
    dtype: torch.dtype | None = None
    link: Link = Link.VIEW
    start: fx.Node | None = None
    last: Link = Link.VIEW
    glue: ScaleShift | None = None
    reading: Reading = None
    depth: int = 0
    root: AffineMap | None = None

    @property
    def size(self) -> int:
        """Features of the node."""
        return self.weight.shape[0]

    @property
    def grouped(self) -> bool:
        """Whether it is a function of what a grouped kernel reads."""
        source = self.source
        return isinstance(source.reading, Patches) and source.reading.groups > 1

    @property
    def source(self) -> AffineMap:
        """The end of its chain."""
        return self.root or self

    def then(
        self,
        node: fx.Node,
        weight: Matrix,
        bias: Matrix | None,
        layout: Layout,
        dtype: torch.dtype | None,
        link: Link = Link.LAYER,
    ) -> AffineMap:
        """A node that is an affine function of this one."""
        made = AffineMap(node, self, weight, layout, bias, dtype, link, node, link)
        return replace(made, depth=self.depth + 1, root=self.source)

    def scaled(self, node: fx.Node, factor: Matrix, dtype: torch.dtype | None) -> AffineMap:
        """A node that is ``diag(factor)`` times this one."""
        own = self._glued(node, dtype)
        bias = own.bias and scaled(factor, own.bias)
        return replace(own, weight=scaled(factor, own.weight), bias=bias)

    def shifted(self, node: fx.Node, shift: Matrix, dtype: torch.dtype | None) -> AffineMap:
        """A node that is this one plus a constant."""
        own = self._glued(node, dtype)
        return replace(own, bias=total(own.bias, shift))

    def gather(self, node: fx.Node, index: Index, layout: Layout) -> AffineMap:
        """A node that holds some of the features: a link of its own, as several may pick."""
        weight = rows(Identity(self.size), index)
        return self.then(node, weight, None, layout, self.dtype, Link.PRODUCT)

    def moved(self, node: fx.Node, layout: Layout, dtype: torch.dtype | None) -> AffineMap:
        """A node with the same features, elsewhere or in another dtype."""
        own = self if self.link is Link.VIEW and self.parent is not None else self._begun(Link.VIEW)
        return replace(own, node=node, layout=layout, dtype=dtype, last=Link.VIEW)

    def of(self, node: fx.Node) -> AffineMap:
        """The same value of another node."""
        return replace(self, node=node)

    def glued(self) -> list[fx.Node]:
        """The nodes that scale or shift in this link."""
        found, here = [], self.glue
        while here is not None:
            found.append(here.node)
            here = here.earlier
        return found

    def relative_to(self, ancestor: AffineMap) -> tuple[Matrix, Matrix | None]:
        """Weight and bias of this node as a function of one further up its chain."""
        weight: Matrix = Identity(self.size)
        bias: Matrix | None = None
        here = self
        while here is not ancestor and here.parent is not None:
            if here.bias is not None:
                bias = total(bias, product(weight, here.bias))
            weight = product(weight, here.weight)
            here = here.parent
        return weight, bias

    def _glued(self, node: fx.Node, dtype: torch.dtype | None) -> AffineMap:
        own = self._begun(Link.GLUE) if self.link is Link.VIEW else self
        return replace(own, node=node, dtype=dtype, last=Link.GLUE, glue=ScaleShift(node, own.glue))

    def _begun(self, link: Link) -> AffineMap:
        """A link that does nothing yet."""
        return self.then(self.node, Identity(self.size), None, self.layout, self.dtype, link)


def common_ancestor(one: AffineMap, other: AffineMap) -> AffineMap | None:
    """The nearest AffineMap that both are functions of, or None if their sources differ."""
    while one is not other:
        if one.depth < other.depth:
            one, other = other, one
        if one.parent is None:
            return None
        one = one.parent
    return one
