"""What trainers call the layers of diffusion models that diffusers calls otherwise.

Where the end of a name is the model's own, nothing stands here: `lora_fx.layers.resolve` finds it.
A trainer's name is one as a whole: a name that shares only its end is of another model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product

from lora_fx.formats.trainer_names import TABLE
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning

# Of the UNet that Stability's sgm has: diffusers' names of a resnet's layers.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(.*?)(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)$")
_FIRST = "down", "0", "resnets"
Line = tuple[str, list[str]]


def names_of(base: BaseLayers) -> dict[str, Meaning]:
    """The names that trainers have for the layers of a base, if it is a model of diffusers."""
    found = dict(_of_unet(base))
    for theirs, several in _lines():
        for name, meaning in _of_line(theirs, several, base):
            found.setdefault(name, meaning)
    return found


def _lines() -> Iterator[Line]:
    """Each line with its beginning: theirs, and ours, whose rows follow each other."""
    rows = TABLE.strip().splitlines()
    left = right = ""
    for row, following in zip(rows, [*rows[1:], ""], strict=True):
        theirs, ours = row.strip().split(" = ")
        if not row.startswith(" "):
            left = right = ""
        if following.startswith(" ") and not row.startswith(" "):
            left, right = f"{theirs}.", f"{ours}."
            continue
        for name, alternative in product(theirs.split(" | "), ours.split(" | ")):
            several = alternative.lstrip("~").split(" + ")
            mark = "~" * alternative.count("~")
            yield left + name, [mark + right + path for path in several]


def _of_line(theirs: str, several: list[str], base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    swapped = several[0].count("~")
    ours = [path.lstrip("~") for path in several]
    first = re.compile(rf"(?:^|(?<=\.)){_regex(ours[0])}$")
    least = len(theirs.removeprefix("@.").split("."))
    found: dict[str, list[Meaning]] = defaultdict(list)
    for path in base:
        match = first.search(path)
        if match is None:
            continue
        start, values = path[: match.start()], match.groups()
        paths = tuple(start + _filled(pattern, values) for pattern in ours)
        if all(other in base for other in paths):
            shape = base[path].own_shape
            swaps = swapped == 2 or (swapped == 1 and shape[0] == 2 * shape[1])
            meant = Meaning(paths, halves_swapped=swaps, least=least)
            found[start + _filled(theirs, values)].append(meant)
    for name, every in found.items():
        if len(every) == 1:  # what @ left out of the name may tell two layers apart
            yield name, every[0]


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\#", r"(\d+)").replace("@", "(.+)")


def _filled(pattern: str, values: Sequence[str]) -> str:
    left = iter(values)
    return re.sub("[#@]", lambda _: next(left), pattern)


def _of_unet(base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    """The blocks of a UNet, which sgm counts through: resnets with attention, and samplers."""
    blocks = {path: match.groups() for path in base if (match := _BLOCK.match(path))}
    each = len({at for _, side, i, what, at, _ in blocks.values() if (side, i, what) == _FIRST})
    attended = {(side, i) for _, side, i, what, *_ in blocks.values() if what == "attentions"}
    for path, (start, side, block, what, at, rest) in blocks.items():
        first = int(block or 0) * (each + 1)
        last = f"{2 if (side, block) in attended else 1}.conv"
        name = {
            ("down", "resnets"): f"input_blocks.{first + int(at) + 1}.0.{_RESNET.get(rest)}",
            ("down", "attentions"): f"input_blocks.{first + int(at) + 1}.1.{rest}",
            ("down", "downsamplers"): f"input_blocks.{first + each + 1}.0.op",
            ("mid", "resnets"): f"middle_block.{2 * int(at)}.{_RESNET.get(rest)}",
            ("mid", "attentions"): f"middle_block.{2 * int(at) + 1}.{rest}",
            ("up", "resnets"): f"output_blocks.{first + int(at)}.0.{_RESNET.get(rest)}",
            ("up", "attentions"): f"output_blocks.{first + int(at)}.1.{rest}",
            ("up", "upsamplers"): f"output_blocks.{first + each}.{last}",
        }.get((side, what))
        if name is not None and each:
            yield start + name, Meaning((path,))
