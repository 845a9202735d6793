from __future__ import annotations

import torch
from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link, common_ancestor
from lora_fx.affine.feature_layout import Layout
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.matrix_expr import Identity, Leaf, Matrix


def layout(size: int) -> Layout:
    return Layout((size,))


def leaf(value: torch.Tensor) -> Leaf:
    return Leaf((value.shape[0], value.shape[1]), id(value), lambda: value)


def chain(*sizes: int) -> list[AffineMap]:
    """A source and the maps that follow it, one link each."""
    graph = fx.Graph()
    maps = [AffineMap(graph.placeholder("x"), None, Identity(sizes[0]), layout(sizes[0]))]
    make = torch.Generator().manual_seed(0)
    for size in sizes[1:]:
        weight = leaf(torch.randn(size, maps[-1].size, generator=make).double())
        bias = leaf(torch.randn(size, 1, generator=make).double())
        node = graph.call_function(torch.neg, (maps[-1].node,))
        maps.append(maps[-1].then(node, weight, bias, layout(size), torch.float64))
    return maps


def number(matrix: Matrix | None) -> torch.Tensor:
    assert matrix is not None
    return dense(matrix, torch.float64)


def test_a_chain_composes_weights_and_biases() -> None:
    source, first, second = chain(3, 5, 7)
    weight, bias = second.relative_to(source)
    x = torch.randn(3, 1, generator=torch.Generator().manual_seed(1)).double()
    hidden = number(first.weight) @ x + number(first.bias)
    exact = number(second.weight) @ hidden + number(second.bias)
    torch.testing.assert_close(number(weight) @ x + number(bias), exact)
    assert not torch.allclose(number(weight) @ x + number(second.bias), exact)
    assert second.relative_to(second) == (Identity(7), None)


def test_paths_meet_at_the_nearest_point() -> None:
    source, first, second = chain(3, 5, 7)
    left = second.then(second.node, leaf(torch.ones(2, 7)), None, layout(2), None)
    right = first.then(first.node, leaf(torch.ones(2, 5)), None, layout(2), None)
    assert common_ancestor(left, right) is first
    assert common_ancestor(right, left) is first
    assert common_ancestor(left, source) is source
    other, *_ = chain(3, 5)
    assert common_ancestor(left, other) is None


def test_scaling_and_shifting_belong_to_the_link_before() -> None:
    source, first = chain(3, 5)
    scaled = first.scaled(first.node, leaf(torch.full((1, 1), 2.0)), torch.float32)
    shifted = scaled.shifted(source.node, leaf(torch.ones(5, 1)), torch.float16)
    assert shifted.parent is source
    assert shifted.depth == first.depth
    assert shifted.dtype == torch.float16
    assert shifted.link is Link.LAYER
    assert shifted.last is Link.GLUE
    assert shifted.glued() == [source.node, first.node]
    torch.testing.assert_close(number(shifted.weight), 2 * number(first.weight))
    torch.testing.assert_close(number(shifted.bias), 2 * number(first.bias) + 1)


def test_moves_are_a_link_of_their_own_and_glue_behind_them_is_another() -> None:
    _, first = chain(3, 5)
    moved = first.moved(first.node, Layout((5,), 1), torch.float32)
    again = moved.moved(first.node, Layout((5,)), torch.float64)
    assert moved.parent is first
    assert again.parent is first
    assert again.depth == first.depth + 1
    scaled = again.scaled(first.node, leaf(torch.full((1, 1), 2.0)), torch.float64)
    assert scaled.parent is again
    assert scaled.link is Link.GLUE
    torch.testing.assert_close(number(scaled.relative_to(first)[0]), 2 * torch.eye(5).double())


def test_picked_features_are_rows_of_the_weight() -> None:
    source, first = chain(3, 5)
    picked = first.gather(first.node, slice_of(5, slice(1, 4)), layout(3))
    weight, bias = picked.relative_to(source)
    torch.testing.assert_close(number(weight), number(first.weight)[1:4])
    torch.testing.assert_close(number(bias), number(first.bias)[1:4])
    assert picked.size == 3


def test_the_same_value_of_another_node() -> None:
    source, first = chain(3, 5)
    assert first.of(source.node).node is source.node
    assert first.of(source.node).weight is first.weight
