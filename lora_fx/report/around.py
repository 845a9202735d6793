"""The calls around a layer, cut out of a graph, as plain values that can be drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.choices import takes
from lora_fx.errors import PassError, shorten
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import GUARDS, module_path, op_name
from lora_fx.layers.sites import by_path
from lora_fx.report.svg import KINDS, drawn
from lora_fx.tables import Html

_MOST = 40  # calls that are drawn
_READERS = 3  # of what the last call gives


@dataclass(frozen=True)
class Box:
    """One call or tensor.

    Attributes:
        text: what it is called.
        kind: ``"call"``, ``"constant"``, ``"adapter"`` (a tensor that an adapter brought) or
            ``"outside"`` (what the layer reads, and who reads it).
        reads: places of the boxes that it reads.
    """

    text: str
    kind: str
    reads: list[int]


@dataclass(frozen=True)
class Drawing:
    """A layer and the calls around it, in order.

    Attributes:
        title: which graph it is cut out of.
        boxes: what is drawn; each reads some that stand before it.
    """

    title: str
    boxes: list[Box] = field(repr=False)

    def __post_init__(self) -> None:
        """Checks what may have been read from a file.

        Raises:
            PassError: a box is of no known kind, or reads one that does not stand before it.
        """
        for place, box in enumerate(self.boxes):
            if box.kind not in KINDS or not all(0 <= read < place for read in box.reads):
                raise PassError(f"the drawing {self.title!r}: box {place} cannot be: {box!r:.200}")

    def __str__(self) -> str:
        """A line for each box."""
        lines = []
        for box in self.boxes:
            read = f" <- {', '.join(self.boxes[n].text for n in box.reads)}" if box.reads else ""
            lines.append(f"{box.text}{read}")
        return "\n".join(lines)

    def picture(self) -> Html:
        """The boxes and their lines."""
        return drawn(self.title, [(box.text, box.kind, box.reads) for box in self.boxes])

    def _repr_html_(self) -> str:
        return self.picture()


class Surroundings:
    """A graph that layers are drawn of.

    Args:
        gm: the graph.
        open: whether what an adapter brings is given at each call, by a slot.
    """

    def __init__(self, gm: fx.GraphModule, open: bool = False) -> None:
        self._gm, self._open, self._sites = gm, open, by_path(gm)
        analysis = analyse(gm)
        regions = maximal_regions(analysis)
        self._constant = analysis.constants.nodes
        self._region = {node: region.nodes for region in regions for node in region.nodes}

    def draw(self, path: str, title: str = "") -> Drawing:
        """The layer at a path, with what stands for one layer together with it.

        Raises:
            PassError: no call of the graph is of a module of this path.
        """
        own, behind = self._calls(path)
        placed: dict[fx.Node, int] = {}
        boxes: list[Box] = []

        def put(node: fx.Node, kind: str, text: str, reads: Iterable[fx.Node] = ()) -> None:
            read = [placed[n] for n in dict.fromkeys(reads) if n in placed]
            placed[node] = len(boxes)
            boxes.append(Box(text, kind, read))

        for node in own:
            for source in node.all_input_nodes:
                if source not in placed:
                    put(source, *self._source(source, path))
            put(node, "call", op_name(node), node.all_input_nodes)
        readers = (n for node in behind for n in sorted(node.users) if n not in own)
        for reader in list(dict.fromkeys(readers))[:_READERS]:
            put(reader, "outside", _named(reader), reader.all_input_nodes)
        return Drawing(title or path, boxes)

    def _calls(self, path: str) -> tuple[list[fx.Node], list[fx.Node]]:
        """The calls that a layer's result is made of, in order; and those from the layer on."""
        calls = [n for n in self._gm.graph.nodes if _is_call(n) and module_path(n) == path]
        starts = [site.node for site in self._sites.get(path, ())] or calls
        if not starts:
            raise PassError(
                f"the graph has no layer {path!r}: it has {shorten(sorted(self._sites))}"
            )
        within = {*calls, *self._region.get(starts[0], ())}
        behind = _closure(starts[:1], lambda node: within.intersection(node.users))
        within |= {node for node in self._constant if _is_call(node)}
        every = _closure(behind, lambda node: within.intersection(node.all_input_nodes))
        return sorted(every), sorted(behind)

    def _source(self, node: fx.Node, path: str) -> tuple[str, str]:
        """The kind and the text of what a layer's calls read."""
        if node.op != "get_attr":
            return "outside", _named(node)
        target = str(node.target)
        name, kind = target.removeprefix(f"{path}."), "constant"
        if "lora_" in target:
            name, kind = target[target.rindex("lora_") :], "adapter"
            if self._open:
                return kind, f"{name.partition('.')[0]}, a slot"
        shape = getattr(get_unevaluated(self._gm, target), "shape", ())
        return kind, f"{name} ({', '.join(map(str, shape))})"


@takes(PassError)
def draw(gm: fx.GraphModule, path: str) -> Drawing:
    """The graph around a layer: printed as lines, and drawn in a notebook.

    Args:
        gm: a traced graph, before or after any pass; it is not changed.
        path: of the layer's module, ``"encoder.layer.0.attention.self.query"``.

    Raises:
        PassError: the graph has no layer there; names those that it has.
    """
    return Surroundings(gm).draw(path)


def _closure(
    start: Iterable[fx.Node], near: Callable[[fx.Node], Iterable[fx.Node]]
) -> list[fx.Node]:
    """What is near, and what is near that, up to as many calls as can be drawn."""
    found = dict.fromkeys(start)
    pending = list(found)
    while pending and len(found) < _MOST:
        fresh = [node for node in near(pending.pop()) if node not in found]
        found.update(dict.fromkeys(fresh))
        pending += fresh
    return list(found)


def _is_call(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr", "output") and node.target != GUARDS


def _named(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return str(node.target)
    path = module_path(node)
    return f"{op_name(node)} of {path}" if path else op_name(node)
