"""What torch.onnx does again and again, done once: the graph that it gives stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.onnx._internal.exporter import _fx_passes, _registration
from torch.onnx._internal.fx.passes import type_promotion


@contextmanager
def without_idle_work() -> Iterator[None]:
    """Lets torch.onnx parse its translations once, and run only the nodes that it changes."""
    exporter: Any = _registration
    passes: Any = _fx_passes
    apis, promote = exporter.onnxscript_apis, passes.insert_type_promotion_nodes
    known = _translations(apis)
    exporter.onnxscript_apis = SimpleNamespace(get_torchlib_ops=lambda: known)
    passes.insert_type_promotion_nodes = _insert_type_promotion
    try:
        yield
    finally:
        exporter.onnxscript_apis, passes.insert_type_promotion_nodes = apis, promote


@cache
def _translations(apis: Any) -> list[Any]:
    return list(apis.get_torchlib_ops())


def _insert_type_promotion(graph_module: fx.GraphModule) -> None:
    for module in graph_module.modules():
        assert isinstance(module, fx.GraphModule)
        promotion: Any = type_promotion.InsertTypePromotion(module, _table())
        promotion.interpreter = _ChangedOnly(module, _table())
        promotion.run()


@cache
def _table() -> type_promotion.TypePromotionTable:
    return type_promotion.TypePromotionTable()


class _ChangedOnly(type_promotion._TypePromotionInterpreter):
    """Casts what mixes dtypes, as torch.onnx does, from the shapes that every node has noted.

    Its own runs the whole graph once more to know them: a third of an export's time. A node that
    is changed is run, and keeps its dtype and shape, so that what follows is still noted right.
    """

    def run_node(self, n: fx.Node) -> Any:
        """What a node gives, as far as its dtype and shape go."""
        if n.op != "call_function" or not isinstance(n.meta.get("val"), torch.Tensor):
            return super().run_node(n)
        rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(n):
                self._maybe_promote_node(n, rule)
        return n.meta["val"]
