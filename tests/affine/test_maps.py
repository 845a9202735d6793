from __future__ import annotations

import torch
from torch import fx

from lora_fx.affine.maps import Map, meet
from lora_fx.weights import Identity, Leaf


def chain(*sizes: int) -> list[Map]:
    """A source and the maps that follow it, one link each."""
    graph = fx.Graph()
    source = Map(graph.placeholder("x"), None, Identity(sizes[0]))
    maps = [source]
    make = torch.Generator().manual_seed(0)
    for size in sizes[1:]:
        weight = torch.randn(size, maps[-1].size, generator=make)
        bias = torch.randn(size, 1, generator=make)
        node = graph.call_function(torch.neg, (maps[-1].node,))
        link = maps[-1].then(node, torch.float32, leaf(weight), leaf(bias))
        maps.append(link)
    return maps


def leaf(value: torch.Tensor) -> Leaf:
    return Leaf((value.shape[0], value.shape[1]), lambda: value)


def test_a_chain_composes_weights_and_biases() -> None:
    source, first, second = chain(3, 5, 7)
    weight, bias = second.since(source)
    assert bias is not None
    x = torch.randn(3, 1)
    hidden = first.weight.dense(torch.float32) @ x + first.bias.dense(torch.float32)
    exact = second.weight.dense(torch.float32) @ hidden + second.bias.dense(torch.float32)
    got = weight.dense(torch.float32) @ x + bias.dense(torch.float32)
    torch.testing.assert_close(got, exact)


def test_paths_meet_at_the_nearest_point() -> None:
    source, first, second = chain(3, 5, 7)
    left = second.then(second.node, torch.float32, leaf(torch.ones(2, 7)))
    right = first.then(first.node, torch.float32, leaf(torch.ones(2, 5)))
    assert meet(left, right) is first
    assert meet(right, left) is first
    assert meet(left, source) is source
    other, *_ = chain(3, 5)
    assert meet(left, other) is None


def test_scaling_and_shifting_belong_to_the_link_before() -> None:
    source, first = chain(3, 5)
    scaled = first.scaled(first.node, leaf(torch.full((1, 1), 2.0)))
    shifted = scaled.shifted(first.node, leaf(torch.ones(5, 1)))
    assert shifted.parent is source
    assert shifted.depth == first.depth
    assert shifted.bias is not None
    bias = 2 * first.bias.dense(torch.float32) + 1
    torch.testing.assert_close(shifted.bias.dense(torch.float32), bias)
