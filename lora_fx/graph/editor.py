"""The editor: every change of a graph goes through it, and what was there before is recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.choices import takes
from lora_fx.errors import PassError
from lora_fx.graph.graph_module import (
    Store,
    assign,
    attribute,
    build_graph_module,
    copy_graph,
    frozen,
    remove,
    targets,
)
from lora_fx.graph.lazy_tensor import LazyTensor, get_all_unevaluated, get_unevaluated
from lora_fx.graph.ops import HOLDER

FOLDED = "lora_fx.folded"  # in the meta of a node: the graph before it was folded
SCALED = "lora_fx.scaled"  # of a layer: what the model does around it was folded into its weight


@dataclass(frozen=True)
class Edit:
    """One thing a pass did, or skipped and why.

    Attributes:
        action: ``"inject"``, ``"fold"``, ``"skip"``, ...
        path: module path (or parameter) that it concerns.
        text: the rest, in words.
    """

    action: str
    path: str
    text: str = ""

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.action} {self.path}" + (f": {self.text}" if self.text else "")


class Editor:
    """Changes a copy of a graph and records what it did.

    New nodes stand where they are asked to and carry the module path of the node they are made
    ``like``. What loses its last reader is swept away at the end; what nobody read before the
    edit stays.

    Attributes:
        gm: the copy under work; read it freely, change it through this class alone.
        edits: what was recorded.
        modified: whether the graph was changed.
    """

    @takes(PassError)
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = build_graph_module(gm, copy_graph(gm.graph), gm.training)
        self.gm.meta = dict(gm.meta)
        self.edits: list[Edit] = []
        self.modified = False
        self._graph = self.gm._graph
        self._source = gm
        self._origin: Origin | None = None
        self._stale: list[fx.Node] = []
        self._store = Store(self.gm)

    def record(self, action: str, path: str, text: str = "") -> None:
        """Notes an edit for the caller."""
        self.edits.append(Edit(action, path, text))

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The tensor that a ``get_attr`` node fetches."""
        value: torch.Tensor = attribute(self.gm, str(node.target))
        return value

    def constant(self, name: str, value: torch.Tensor | LazyTensor, before: fx.Node) -> fx.Node:
        """Fetches a new tensor just before a node.

        It is called ``name`` if nothing else is by the end, else ``name_1`` and so on. An equal
        tensor of one name, such as that of a layer that is called twice, is kept once.

        Args:
            name: dotted, such as ``fc.lora_A.french``: modules on the way are made.
            value: of any shape and dtype; a lazy one is computed when it is read.
            before: where it is fetched.
        """
        if not isinstance(value, torch.Tensor | LazyTensor):
            raise PassError(f"constant {name!r} is {value!r:.80}: give a tensor")
        target = self._store.constant(name, value)
        with self._before(before):
            return self._made(self._graph.create_node("get_attr", target))

    def hold(self, name: str, value: torch.Tensor | LazyTensor) -> None:
        """Puts another tensor into a module that is called whole: a shell of this graph's own."""
        if isinstance(attribute(self.gm, name), nn.Parameter) and isinstance(value, torch.Tensor):
            value = nn.Parameter(value.detach(), requires_grad=False)
        assign(self.gm, name, value)
        self.modified = True

    def call(
        self, target: Any, arguments: tuple[Any, ...], before: fx.Node, like: fx.Node
    ) -> fx.Node:
        """Calls an operator just before a node.

        Args:
            target: an overload, such as ``torch.ops.aten.mul.Tensor``.
            arguments: by place; it has no others.
            before: where the call goes.
            like: whose module path it has.
        """
        with self._before(before):
            node = self._graph.create_node("call_function", target)
        node.args = arguments  # not given above: create_node walks arguments as a pytree
        return self._made(node, like)

    def inline(
        self, function: Callable[..., Any], operands: Sequence[Any], before: fx.Node, like: fx.Node
    ) -> tuple[Any, list[fx.Node]]:
        """Writes down what a function of aten overloads calls, just before a node.

        Args:
            function: of operands.
            operands: nodes, lists of them, and anything else. A tensor that the graph fetches
                later only is fetched again.
            before: where the calls go.
            like: whose module path they have.

        Returns:
            What the function returns, nodes for what it computes; and all calls, in order.
        """
        start = before.prev
        with self._before(before):
            tracer = fx.proxy.GraphAppendingTracer(self._graph)

            def proxy(node: fx.Node) -> fx.Proxy:
                is_late = node.op == "get_attr" and before < node
                return fx.Proxy(self._graph.node_copy(node) if is_late else node, tracer)

            result = function(*pytree.tree_map_only(fx.Node, proxy, list(operands)))
        made = []
        while (start := start.next) is not before:
            made.append(self._made(start, like))
        result = pytree.tree_map_only(fx.Proxy, lambda value: value.node, result)
        return result, [node for node in made if node.op == "call_function"]

    def along(self, moves: Sequence[fx.Node], start: fx.Node, before: fx.Node) -> fx.Node:
        """Makes calls of one input again, one behind the other from another start on.

        Args:
            moves: in order, each of which reads the one before as its first argument.
            start: what the first of the new ones reads.
            before: where they go.

        Returns:
            The last of them; ``start`` if there are none.
        """
        here = start
        for move in moves:
            old = move.args[0]
            with self._before(before):
                copy = self._graph.node_copy(move, _exchanged(old, here))
            here = self._made(copy)
        return here

    def again(
        self,
        calls: Sequence[fx.Node],
        given: Mapping[fx.Node, fx.Node],
        before: fx.Node | None = None,
    ) -> Mapping[fx.Node, fx.Node]:
        """Makes calls again, with some of what they read exchanged.

        Args:
            calls: in order.
            given: a node -> what is read instead.
            before: where they go, with the tensors that they read; in front of themselves if None.

        Returns:
            ``given``, and each call -> its copy.
        """
        known = dict(given)
        late = [n for call in calls for n in call.all_input_nodes if n.op == "get_attr"]
        for call in [*(n for n in dict.fromkeys(late) if before and before < n), *calls]:
            if call in given:
                continue
            with self._before(before or call):
                copy = self._graph.node_copy(call, lambda node: known.get(node, node))
            known[call] = self._made(copy)
        return known

    def call_module(self, name: str, module: nn.Module, x: fx.Node, before: fx.Node) -> fx.Node:
        """Calls a new module, whose training mode stays live, just before a node.

        Args:
            name: dotted, as in `constant`.
            module: the graph's own from then on.
            x: what it reads; it has the module path of that.
            before: where the call goes.
        """
        target = self._store.keep(name, module)
        with self._before(before):
            node = self._graph.create_node("call_module", target, (x,))
        return self._made(node, x)

    def replace(self, old: fx.Node, new: fx.Node, keep: Collection[fx.Node] = ()) -> None:
        """Makes readers of one node read another.

        Args:
            old: the one; swept at the end if nobody reads it then.
            new: the other; if it reads ``old`` itself, it goes on to.
            keep: readers that stay with ``old``.
        """
        self._check(old, new)
        stays = {new, *keep}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in stays)
        self._drop(old)

    def rebind(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Makes one node read ``new`` where it read ``old``, which is swept if nobody else does."""
        self._check(reader, old, new)
        reader.replace_input_with(old, new)
        self._drop(old)

    def freeze(self) -> None:
        """Makes every parameter so far take no gradient, without touching the model's own."""
        for target, op in targets(self._graph).items():
            value = attribute(self.gm, target)
            if op == "call_module":
                assign(self.gm, target, frozen(value))
            elif isinstance(value, nn.Parameter):
                assign(self.gm, target, nn.Parameter(value.detach(), requires_grad=False))

    def remember(self, folded: fx.Node, original: fx.Node) -> None:
        """Notes that a new node stands for the region that ends in ``original``."""
        if self._origin is None:
            copy = copy_graph(self._source.graph)
            self._origin = Origin.of(build_graph_module(self._source, copy, self._source.training))
        folded.meta[FOLDED] = (self._origin, original.name)
        if "val" in original.meta:
            folded.meta.setdefault("val", original.meta["val"])

    def scale(self, layer: fx.Node) -> None:
        """Notes that a layer, and what stands for it, holds more than its weight and adapters."""
        layer.meta[SCALED] = True

    def insert(self, node: fx.Node, source: fx.GraphModule, after: fx.Node, args: Any) -> fx.Node:
        """Puts a copy of another graph's node behind one of this graph, name and tensor included.

        Args:
            node: of ``source``.
            source: what the node's target is looked up in.
            after: where it goes.
            args: from the other graph's nodes to this one's.
        """
        self._check(after)
        with self._graph.inserting_after(after):
            copy = self._graph.node_copy(node, args)
        if node.op in ("get_attr", "call_module"):
            value = get_unevaluated(source, str(node.target))
            copy.target = self._store.shared(str(node.target), value)
        return self._made(copy)

    def finish(self) -> fx.GraphModule:
        """Sweeps, grants the names that came free and lints: each once."""
        self.sweep()
        self._rename()
        self._lint()
        follow(self._source, self.gm)
        return self.gm

    def _lint(self) -> None:
        """Checks the graph without reading tensors, some of which are still to be computed."""
        self._graph.owning_module = None
        try:
            self._graph.lint()
        except (RuntimeError, ValueError, AssertionError) as error:
            raise PassError(f"the edited graph cannot run; correct the edit: {error}") from error
        self._graph.owning_module = self.gm
        get_all_unevaluated(self.gm, targets(self._graph))

    def _check(self, *nodes: fx.Node) -> None:
        """Refuses what is no node of the copy: one of the graph that went in would change that."""
        for node in nodes:
            if not isinstance(node, fx.Node) or node.graph is not self._graph:
                raise PassError(f"{node!r:.80} is no node of editor.gm.graph: give one of its own")

    def _before(self, node: fx.Node) -> AbstractContextManager[Any]:
        self._check(node)
        where: AbstractContextManager[Any] = self._graph.inserting_before(node)
        return where

    def _made(self, node: fx.Node, like: fx.Node | None = None) -> fx.Node:
        for key in ("nn_module_stack", HOLDER, SCALED):
            if like is not None and key in like.meta:
                node.meta[key] = like.meta[key]
        self.modified = True
        return node

    def _drop(self, node: fx.Node) -> None:
        self._stale.append(node)
        self.modified = True

    def sweep(self) -> None:
        """Drops what has lost its last reader since the edit began; `finish` does so too."""
        unread = set()
        while self._stale:
            node = self._stale.pop()
            if node.users or node._erased or node.op in ("placeholder", "output"):
                continue
            self._stale.extend(node.all_input_nodes)
            if node.op in ("get_attr", "call_module"):
                unread.add(str(node.target))
            if self._origin is not None:
                self._origin.swept.add(node.name)
            self._graph.erase_node(node)
        for target in unread - targets(self._graph).keys():
            remove(self.gm, target)

    def _rename(self) -> None:
        granted = self._store.settle()
        for node in self._graph.nodes if granted else ():
            if node.op in ("get_attr", "call_module") and str(node.target) in granted:
                node.target = granted[str(node.target)]


def _exchanged(old: Any, new: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: new if node is old else node


@dataclass(eq=False)
class Origin:
    """The graph before one fold.

    Attributes:
        gm: a private copy of it, tensors shared.
        generation: how many folds came before it.
        swept: names of the nodes that the fold removed.
    """

    gm: fx.GraphModule
    generation: int
    swept: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Origin:
        """The origin of a fold of ``gm``."""
        earlier = [origin.generation for origin in origins(gm)]
        return cls(gm, max(earlier, default=0) + 1)


def origins(gm: fx.GraphModule) -> list[Origin]:
    """The origins of all folded nodes of a graph."""
    return [node.meta[FOLDED][0] for node in gm.graph.nodes if FOLDED in node.meta]


@runtime_checkable
class Note(Protocol):
    """What rides along in ``gm.meta`` and speaks of the graph's tensors."""

    def after(self, before: fx.GraphModule, now: fx.GraphModule) -> Note:
        """The same of a graph that a pass has edited.

        Args:
            before: the graph that the note was of.
            now: the graph that it is to be of, which may lack some of its tensors.
        """


def follow(before: fx.GraphModule, now: fx.GraphModule) -> None:
    """Brings the notes of a graph to what an edit has made of it."""
    for key, note in list(now.meta.items()):
        if isinstance(note, Note):
            now.meta[key] = note.after(before, now)
