"""Functionalization: in-place operators become out-of-place ones, and later readers follow.

``y = zeros(...); y.view(-1, 15)[:, mask] = v`` leaves no node that holds what y is in the end. So
a write becomes a value of its own, `index_put`, and everyone who reads y afterwards, or any view
of its memory, reads that. Memory that the caller can see, inputs and buffers, is written to all
the same. Where the views of some memory can not be told apart the write stays, and those who read
afterwards read an alias: so no node is ever read before and after a write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from lora_fx.frontend.out_of_place import NoTwinError, twin
from lora_fx.graph.aliasing import Memory, storages
from lora_fx.graph.memory_views import path_to, put_back, viewed
from lora_fx.graph.ops import aten, draws, function_name, written_arguments

_VISIBLE = ("placeholder", "get_attr")


def functionalise(graph: fx.Graph) -> None:
    """Rewrites writes as values, in place."""
    writes = [node for node in graph.nodes if written_arguments(node)]
    if not all(map(_is_seen, writes)):
        _look_again(graph)
    memory = Memory(graph) if writes else None
    for write in writes:
        assert memory is not None
        rewrite = _Rewrite(write, memory)
        try:
            rewrite.run()
        except NoTwinError:
            rewrite.undo()
            rewrite.name_afterwards()


class _Rewrite:
    """One write, and the nodes that are made for it."""

    def __init__(self, write: fx.Node, memory: Memory) -> None:
        self.write, self.memory = write, memory
        self.made: list[fx.Node] = []

    def run(self) -> None:
        """Replaces the write by the value it makes, seen through every view of the same memory.

        Raises:
            NoTwinError: the value has no operator, or something may share the memory in other ways.
        """
        into = self._into()
        if torch.Tag.inplace_view in getattr(self.write.target, "tags", ()):
            return self._turn(into)
        path = path_to(into)
        root = path[0]
        later = self._later(root)
        visible = root.op in _VISIBLE
        if visible and (draws(self.write) or not self._is_read(later)):
            return None
        value = twin(self.call, self.write, into)
        whole = put_back(self.call, path, value)
        if whole is None or not _fits(root, whole):
            raise NoTwinError
        now = {root: whole}
        for view in later:
            self._again(view, now)
        self._again(into, now)
        for old, new in now.items():
            self._move_readers(old, new, visible)
        self._move_readers(self.write, now[into], visible)
        self._sweep()
        if not visible:
            self.write.graph.erase_node(self.write)
        for view in reversed([*path[1:], *later]):
            _sweep_view(view)
        return None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Makes a call just before the write, and notes what it gives as the tracer would."""
        write = self.write
        kind = "call_method" if isinstance(target, str) else "call_function"
        with write.graph.inserting_before(write):
            node = write.graph.create_node(kind, target, args, kwargs)
        node.meta.update({k: v for k, v in write.meta.items() if k != "val"})
        self.made.append(node)
        _note(node)
        self.memory.add(node)
        return node

    def undo(self) -> None:
        """Takes back what was made."""
        for node in reversed(self.made):
            node.graph.erase_node(node)
        self.made = []

    def name_afterwards(self) -> None:
        """Gives what is read behind a write that stays a node of its own."""
        write = self.write
        for into in written_arguments(write):
            for node in self.memory.group(into):
                is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
                readers = [n for n in node.users if n > write and n.op != "output"]
                if node > write or not is_tensor or not any(viewed(n) is None for n in readers):
                    continue
                with write.graph.inserting_after(write):
                    alias = write.graph.call_function(aten.alias.default, (node,))
                alias.meta.update(node.meta)
                for reader in readers:
                    reader.replace_input_with(node, alias)
                self.memory.add(alias)

    def _into(self) -> fx.Node:
        written = written_arguments(self.write)
        if len(written) != 1 or isinstance(self.write.target, torch._ops.HigherOrderOperator):
            raise NoTwinError
        return written[0]

    def _later(self, root: fx.Node) -> list[fx.Node]:
        """The views of the memory that are read after the write."""
        found: list[fx.Node] = []
        for node in self.memory.group(root):
            if node is root or not node < self.write:
                continue
            is_read = any(user > self.write for user in node.users)
            if path_to(node)[0] is root:
                found += [node] if is_read else []
            elif is_read or node.op in _VISIBLE:
                raise NoTwinError
        return found

    def _is_read(self, later: Iterable[fx.Node]) -> bool:
        """Whether somebody needs to know what visible memory holds after the write."""
        root = path_to(self._into())[0]
        behind = {user for n in (root, *later) for user in n.users if user > self.write}
        return any(user.op != "output" for user in behind | set(self.write.users))

    def _again(self, view: fx.Node, now: dict[fx.Node, fx.Node]) -> None:
        """Says a view again, of what its memory holds now."""
        if view in now:
            return
        source = viewed(view)
        assert source is not None
        self._again(source, now)
        target: Any = view.target
        now[view] = self.call(target, now[source], *view.args[1:], **view.kwargs)

    def _move_readers(self, old: fx.Node, new: fx.Node, visible: bool) -> None:
        for user in list(old.users):
            if user > self.write and not (visible and user.op == "output"):
                user.replace_input_with(old, new)

    def _turn(self, into: fx.Node) -> None:
        """``y.unsqueeze_(0)`` writes nothing: y itself is another view from then on."""
        target: Any = self.write.target
        packet = getattr(aten, target._schema.name.split("::")[-1].removesuffix("_"), None)
        other = getattr(packet, target._overloadname, None)
        if other is None:
            raise NoTwinError
        view = self.call(other, *self.write.args, **self.write.kwargs)
        self._move_readers(into, view, visible=False)
        self._move_readers(self.write, view, visible=False)
        self.write.graph.erase_node(self.write)

    def _sweep(self) -> None:
        for node in reversed(self.made):
            if not node.users:
                node.graph.erase_node(node)


def _sweep_view(view: fx.Node | None) -> None:
    """Erases a view that nobody reads any more."""
    while view is not None and not view._erased and not view.users:
        source = viewed(view)
        if source is not None:
            view.graph.erase_node(view)
        view = source


def _fits(root: fx.Node, whole: fx.Node) -> bool:
    """Whether a value lies in memory as the old one does: views of it are taken for granted."""
    old, new = root.meta.get("val"), whole.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return not isinstance(old, torch.Tensor)
    if new.dtype.is_complex and function_name(whole.target).endswith("_scatter"):
        return False  # torch has no gradients of these, and has some of the write
    return _seen(old.stride()) == _seen(new.stride())


def _seen(sizes: Iterable[Any]) -> list[Any]:
    """Sizes as the example has them: the same may be written ``21`` and ``Min(21, 21 * s)``."""
    return [s.node.hint if isinstance(s, torch.SymInt) and s.node.has_hint() else s for s in sizes]


def _note(node: fx.Node) -> None:
    """Finds what the tracer would have seen of a call, if it has seen what the call reads."""
    if node.op != "call_function" or not all("val" in n.meta for n in node.all_input_nodes):
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    leaves = [n.meta["val"] for n in node.all_input_nodes]
    modes = [v.fake_mode for v in leaves if isinstance(v, FakeTensor)]
    if not modes:
        return
    try:
        with torch.no_grad(), modes[0], enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # a view that the new value has not, an operator without shapes
        raise NoTwinError from error


def _is_seen(write: fx.Node) -> bool:
    """Whether what was traced shows that a write returns what it writes into."""
    own = storages(write.meta.get("val"))
    if not own or not isinstance(write.target, torch._ops.OpOverload):
        return True
    return set(own) <= {s for n in written_arguments(write) for s in storages(n.meta.get("val"))}


def _look_again(graph: fx.Graph) -> None:
    """Finds anew what calls give: a program from a file does not say what shares memory."""
    for node in graph.nodes:
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if node.op == "call_function" and known:
            before = node.meta.get("val")
            try:
                _note(node)
            except NoTwinError:
                node.meta["val"] = before
