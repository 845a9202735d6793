"""Makes torch.onnx faster: what it does again and again is done once; its graph stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx
from torch._export import utils as export_utils
from torch.export import exported_program
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.fx.passes import type_promotion


@contextmanager
def without_idle_work() -> Iterator[None]:
    """Lets torch.onnx read its translations once, and run only the nodes that it changes."""
    changes: list[tuple[Any, str, Any]] = [
        (_registration.ONNXRegistry, "from_torchlib", staticmethod(_registry)),
        (_fx_passes, "insert_type_promotion_nodes", _insert_type_promotion),
        (_fx_passes, "remove_assertion_nodes", _without_assertions),
        (_decomp, "create_onnx_friendly_decomposition_table", _decompositions),
        (exported_program, "_collect_all_valid_cia_ops", _composite_operators),
        (ir.schemas.OpSignature, "from_op_schema", staticmethod(_signature)),
    ]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_TABLE_OF = _decomp.create_onnx_friendly_decomposition_table
_WITHOUT_ASSERTIONS = _fx_passes.remove_assertion_nodes
_COMPOSITE_OPERATORS = export_utils._collect_all_valid_cia_ops
_FROM_TORCHLIB = _registration.ONNXRegistry.from_torchlib
_FROM_OP_SCHEMA = ir.schemas.OpSignature.from_op_schema


def _without_assertions(gm: fx.GraphModule) -> fx.GraphModule:
    """Takes out what is asserted of values, and what is computed for that alone.

    torch.onnx leaves the latter, and has no translation of some of it.
    """
    gm = _WITHOUT_ASSERTIONS(gm)
    gm.graph.eliminate_dead_code()
    return gm


def _registry(opset_version: int = TORCHLIB_OPSET) -> _registration.ONNXRegistry:
    """All translations of an opset, in a registry that may be added to."""
    known = _known_translations(opset_version)
    registry = _registration.ONNXRegistry()
    registry._opset_version = opset_version
    registry.functions = {target: [*metas] for target, metas in known.functions.items()}
    return registry


@cache
def _known_translations(opset_version: int) -> _registration.ONNXRegistry:
    return _FROM_TORCHLIB(opset_version)


def _decompositions(translated: set[Any]) -> dict[Any, Any]:
    """How what has no translation is taken apart; operators may be registered at any time."""
    known = frozenset(translated), _registered(), len(torch._decomp.decomposition_table)
    if known not in _TABLES:
        _TABLES.clear()
        _TABLES[known] = _TABLE_OF(translated)
    return dict(_TABLES[known])


_TABLES: dict[Any, dict[Any, Any]] = {}


def _composite_operators() -> set[Any]:
    """The operators that stay whole unless a table takes them apart."""
    return _operators_among(_registered())


@lru_cache(maxsize=1)
def _operators_among(registered: tuple[str, ...]) -> set[Any]:
    return _COMPOSITE_OPERATORS()


def _registered() -> tuple[str, ...]:
    """The names of all composite operators: there are more once a program registers its own."""
    return tuple(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))


def _signature(schema: onnx.defs.OpSchema) -> ir.schemas.OpSignature:
    key = schema.domain, schema.name, schema.since_version
    if key not in _SIGNATURES:
        _SIGNATURES[key] = _FROM_OP_SCHEMA(schema)
    return _SIGNATURES[key]


_SIGNATURES: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}


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
