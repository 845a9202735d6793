"""Every kind on every layer: what docs/KINDS.md says, measured; as a program this writes it."""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import (
    Adapter,
    AdapterError,
    LoraConfig,
    LoraFxError,
    Update,
    adapter_from,
    inject,
    text,
)
from lora_fx.adapters.adapter import AnyUpdate, Scaling
from lora_fx.explanation import explain
from lora_fx.kinds.loralib import block_diagonal
from lora_fx.testing import Attention, Between, Experts, LayerShape, relative, update_of
from lora_fx.testing.updates import ALPHA, RANK

DOCUMENT = Path(__file__).parents[2] / "docs" / "KINDS.md"
MARK = "\n# Types of PEFT without a kind of ours\n"
Row = tuple[str, ...]
COLUMNS = ("inject", "fold", "constant", "swappable", "train", "save")
FORMATS: list[tuple[str, str, dict[str, Any]]] = [
    ("PEFT", "french", {}),
    ("kohya", "french.safetensors", {"component": "lycoris"}),
    ("loralib", "french_loralib.safetensors", {}),
]
TEXT = """# Kinds of adapters, layer by layer

Written by `make matrix` (`python tests/oracle/test_matrix.py`): every cell is what a small model
did, and `tests/oracle/test_matrix.py` holds this file against it again, row by row. In every cell
the base alone is off by more than 1e-2, so that an adapter which is ignored agrees with nothing.
"no" is an error derived from `lora_fx.LoraFxError`; the footnote is its message.

- **inject**: the graph of `inject` agrees with the weight form W', put into a copy of the model, to
  1e-6.
- **fold**: `fold` of it agrees to 1e-5 and holds the adapter no more; "stays": it agrees, and the
  adapter is still beside the layer; the footnote is what `explain` says of the layer.
- **constant**: `to_onnx` of the injected graph is verified, and onnxruntime agrees to 1e-5.
- **swappable**: the base is exported with `adapters="input"` and a slot at the layer, of the form
  `"vectors"`; with the file that `export_adapter` makes, onnxruntime agrees to 1e-5, and without
  one it agrees with the base. "whole": its weight is made anew, so the slot is of the form
  `"weight"`, and each adapter as large as the layer.
- **train**: `inject` of a fresh `LoraConfig` trains: the loss falls, and `adapter_from` reads back
  what was learned.
- **save**: the first of these formats that `save_adapter` writes and `load_adapter` reads back,
  with outputs equal to 1e-6; each is tried, and "no" has the messages of all. What PEFT itself
  loads is held by `tests/oracle/test_kinds.py`; it has no adapters of transposed convolutions, so
  such a directory is for `load_adapter` alone.

OFT is PEFT's on matrices and LyCORIS' `diag-oft` on convolutions; "fused" is loralib's
`MergedLinear` with `enable_lora`; "full" is LyCORIS' difference of the whole weight; "tokens" are
PEFT's trainable tokens. "rows of a packed attention" is `nn.MultiheadAttention` whose query differs
from its key, so that parts of one weight are read by several calls; "experts" are a parameter with
a matrix for each of them.

| kind | layer | inject | fold | constant | swappable | train | save |
|---|---|---|---|---|---|---|---|
{rows}

Left out, because the kind is not defined there:

{left_out}

{notes}
"""


@dataclass(frozen=True)
class Layer:
    """A model with one layer: its inputs beside the batch, its weight as (out, in, *kernel)."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    path: str = "layer"
    groups: int = 1
    is_table: bool = False

    def update(self, kind: str) -> AnyUpdate:
        make = self.make if self.path != "layer" else None
        return update_of(kind, LayerShape(self.shape, self.groups, self.is_table, self.path, make))

    def example(self, batch: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(batch)
        if self.is_table:
            return torch.randint(0, self.shape[1], (batch, *self.inputs), generator=source)
        return torch.randn(batch, *self.inputs, generator=source)


LAYERS: dict[str, Layer] = {
    "linear": Layer(lambda: Between(nn.Linear(4, 6)), (7, 4), (6, 4)),
    "Conv1D of transformers": Layer(lambda: Between(Conv1D(6, 4)), (7, 4), (6, 4)),
    "embedding": Layer(lambda: Between(nn.Embedding(10, 6)), (7,), (6, 10), is_table=True),
    "conv1d": Layer(lambda: Between(nn.Conv1d(4, 6, 3, stride=2)), (4, 9), (6, 4, 3)),
    "conv2d": Layer(lambda: Between(nn.Conv2d(4, 6, (3, 2), padding=1)), (4, 7, 8), (6, 4, 3, 2)),
    "conv3d": Layer(lambda: Between(nn.Conv3d(4, 6, (3, 2, 1))), (4, 7, 8, 5), (6, 4, 3, 2, 1)),
    "grouped conv2d": Layer(
        lambda: Between(nn.Conv2d(4, 6, (3, 2), groups=2)), (4, 7, 8), (6, 2, 3, 2), groups=2
    ),
    "conv_transpose1d": Layer(
        lambda: Between(nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2)), (4, 9), (6, 4, 3)
    ),
    "conv_transpose2d": Layer(
        lambda: Between(nn.ConvTranspose2d(4, 6, (3, 2), 2, padding=1, output_padding=1)),
        (4, 5, 6),
        (6, 4, 3, 2),
    ),
    "packed attention": Layer(lambda: Attention(4), (7, 4), (12, 4)),
    "rows of a packed attention": Layer(lambda: Attention(4, crossed=True), (7, 4), (12, 4)),
    "experts": Layer(lambda: Between(Experts()), (7, 4), (3, 6, 4), "layer.up_proj"),
}


# As the document calls a kind -> its name in `UPDATES`.
KINDS = {
    "LoRA": "lora",
    "rsLoRA": "rslora",
    "LoRA with bias": "lora_bias",
    "DoRA": "dora",
    "AdaLoRA": "adalora",
    "VeRA": "vera",
    "LoHa": "loha",
    "LoKr": "lokr",
    "GLoRA": "glora",
    "(IA)3 on outputs": "ia3",
    "(IA)3 on inputs": "ia3_in",
    "OFT": "oft",
    "fused": "fused",
    "full": "full",
    "tokens": "tokens",
}
_CONVOLUTIONS = [name for name in LAYERS if "conv" in name]
# Kind -> the layers that it is not defined on, and why.
LEFT_OUT: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
LEFT_OUT["VeRA"] |= dict.fromkeys(_CONVOLUTIONS, "its projections have no kernel")
LEFT_OUT["(IA)3 on inputs"] |= {"embedding": "it reads ids"}
LEFT_OUT["fused"] |= dict.fromkeys(["embedding", *_CONVOLUTIONS], "a fused layer is linear")
LEFT_OUT["tokens"] |= dict.fromkeys(LAYERS.keys() - {"embedding"}, "tokens are rows of a table")
for _kind in KINDS.keys() - {"LoRA", "rsLoRA", "tokens"}:
    LEFT_OUT[_kind] |= {"experts": "files hold LoRA alone of a parameter"}
CASES = [(kind, layer) for kind in KINDS for layer in LAYERS if layer not in LEFT_OUT[kind]]


@functools.cache
def base_of(name: str) -> tuple[nn.Module, Any]:
    """A model and its graph: of attention from torch.export, which alone can open it."""
    torch.manual_seed(0)
    model = LAYERS[name].make().eval().requires_grad_(False)
    frontend = "export" if "attention" in name else "auto"
    x = LAYERS[name].example(4)
    return model, lora_fx.trace(model, (x,), dynamic_shapes=({0: "batch"},), frontend=frontend)


@functools.cache
def swappable(name: str, form: str) -> bytes:
    """A file with a slot at the layer, exported once for all kinds."""
    with tempfile.TemporaryDirectory() as directory:
        path, slots = Path(directory, "m.onnx"), {LAYERS[name].path: form}
        lora_fx.to_onnx(base_of(name)[1], path, adapters="input", slots=slots)
        return path.read_bytes()


def ungrouped(conv: Any) -> nn.Module:
    """The convolution without groups that computes the same."""
    count, (rows, columns) = conv.groups, conv.weight.shape[:2]
    whole = nn.Conv2d(columns * count, rows, conv.kernel_size)
    nn.init.zeros_(whole.weight)
    whole.bias.data.copy_(conv.bias)  # type: ignore[union-attr]
    for group in range(count):
        own = slice(group * rows // count, (group + 1) * rows // count)
        into = slice(group * columns, (group + 1) * columns)
        whole.weight.data[own, into] = conv.weight[own]
    return whole


def merged(layer: Layer, model: nn.Module, update: AnyUpdate) -> nn.Module:
    """The weight form, put into a copy of the model."""
    tuned: Any = copy.deepcopy(model)
    if layer.groups > 1 and update.shape[1] != layer.shape[1]:
        tuned.layer = ungrouped(tuned.layer)
        if isinstance(update, Update):
            update = replace(update, up=block_diagonal(update.up, (True,) * layer.groups))
    held, bias = tuned.layer, getattr(tuned.layer, "bias", None)
    if isinstance(held, nn.MultiheadAttention):
        weight, bias = held.in_proj_weight, held.in_proj_bias
    else:
        weight = held.up_proj if isinstance(held, Experts) else held.weight
    turned = isinstance(held, Conv1D | nn.Embedding | nn.ConvTranspose1d | nn.ConvTranspose2d)
    new = update.weight(weight.transpose(0, 1) if turned else weight)
    weight.data.copy_(new.transpose(0, 1) if turned else new)
    if isinstance(update, Scaling):
        if update.row is not None and bias is not None:
            bias.data.mul_(update.row)
    elif update.bias is not None:
        shift = update.bias * (update.scale if isinstance(update, Update) else 1)
        if bias is None:
            held.register_forward_hook(lambda module, inputs, y: y + shift)
        else:
            bias.data.add_(shift)
    return tuned


class Case:
    """One kind on one layer, and what each column of the document does with it."""

    def __init__(self, kind: str, layer: str, directory: Path) -> None:
        self.kind, self.name, self.layer, self.directory = kind, layer, LAYERS[layer], directory
        self.model, self.gm = base_of(layer)
        self.update = self.layer.update(KINDS[kind])
        self.adapter = Adapter("a", {self.layer.path: self.update})
        self.x = self.layer.example(6)

    def agrees(self, outputs: torch.Tensor, within: float, wanted: torch.Tensor) -> None:
        """Asserts that outputs are what is wanted, and that the base's are not."""
        assert relative(outputs, wanted) <= within
        assert relative(self.model(self.x), wanted) > 1e-2

    @functools.cached_property
    def wanted(self) -> torch.Tensor:
        outputs: torch.Tensor = merged(self.layer, self.model, self.update)(self.x)
        return outputs

    @functools.cached_property
    def injected(self) -> fx.GraphModule:
        return inject(self.gm, self.adapter)

    def run(self, model: Path, adapter: Path | None = None) -> torch.Tensor:
        (outputs,) = lora_fx.Session(model, threads=1).run({"x": self.x}, adapter=adapter).values()
        return torch.from_numpy(outputs)

    def inject(self) -> str:
        self.agrees(self.injected(self.x), 1e-6, self.wanted)
        return "yes"

    def fold(self) -> str:
        folded = lora_fx.fold(self.injected)
        self.agrees(folded(self.x), 1e-5, self.wanted)
        if "lora_" not in text(folded):
            return "yes"
        # Without torch's numbers of nodes.
        return f"stays: {re.sub(r'_tensor(_[0-9]+)?', '', explain(self.injected)[0])}"

    def constant(self) -> str:
        path = self.directory / "model.onnx"
        report = lora_fx.to_onnx(self.injected, path)
        assert report.verified
        self.agrees(self.run(path), 1e-5, self.wanted)
        return "yes"

    def swappable(self) -> str:
        try:
            return self.swapped("vectors", "yes")
        except AdapterError as refusal:
            if "makes the weight anew" not in str(refusal):
                raise
        return self.swapped("weight", "whole")

    def swapped(self, form: str, word: str) -> str:
        path, file = self.directory / "swappable.onnx", self.directory / "a.onnx_adapter"
        path.write_bytes(swappable(self.name, form))
        lora_fx.export_adapter(self.adapter, path, file)
        self.agrees(self.run(path, file), 1e-5, self.wanted)
        assert relative(self.run(path), self.model(self.x)) <= 1e-5
        return word

    def train(self) -> str:
        """The loss falls, and what was learned is read back."""
        kind = {"LoRA": "lora", "rsLoRA": "lora", "LoRA with bias": "lora_bias"}.get(self.kind)
        options: dict[str, Any] = {"kind": kind or self.update.kind, "seed": 0}
        options |= {"use_rslora": self.kind == "rsLoRA", "target_modules": [self.layer.path]}
        gm = inject(self.gm, LoraConfig(r=RANK, alpha=ALPHA, **options))
        optimizer = torch.optim.Adam([p for p in gm.parameters() if p.requires_grad], lr=0.02)
        first = gm(self.x).square().mean()
        with torch.enable_grad():
            for _ in range(4):
                optimizer.zero_grad()
                gm(self.x).square().mean().backward()
                optimizer.step()
        assert gm(self.x).square().mean() < first
        self.agrees(inject(self.gm, adapter_from(gm))(self.x), 1e-6, gm(self.x))
        return "yes"

    def save(self) -> str:
        """The first format that holds it and gives it back."""
        injected, refusals = self.injected(self.x), []
        for name, file, hints in FORMATS:
            path = self.directory / file
            try:
                lora_fx.save_adapter(self.adapter, path, format=name.lower(), **hints)
                again = lora_fx.load_adapter(path, base=self.model)
                self.agrees(inject(self.gm, again)(self.x), 1e-6, injected)
                return name
            except LoraFxError as refusal:
                refusals.append(f"{name}: {refusal}")
        raise AdapterError("; ".join(refusals))


def row_of(kind: str, layer: str, directory: Path) -> Row:
    """What each column says, as ``"yes"`` or ``"no: the message of the refusal"``."""
    case, cells = Case(kind, layer, directory), []
    for column in COLUMNS:
        try:
            with torch.no_grad():
                cells.append(getattr(case, column)())
        except LoraFxError as refusal:
            cells.append(f"no: {refusal}")
    return tuple(cell.replace(f"{directory}/", "").strip() for cell in cells)


def written(rows: Mapping[tuple[str, str], Row]) -> str:
    """The document of rows."""
    notes: dict[str, int] = {}
    lines = []
    for (kind, layer), row in rows.items():
        cells = [kind, layer]
        for cell in row:
            word, _, note = cell.partition(": ")
            cells.append(f"{word}[^{notes.setdefault(note, len(notes) + 1)}]" if note else word)
        lines.append(f"| {' | '.join(cells)} |")
    footnotes = "\n".join(f"[^{number}]: {note}" for note, number in notes.items())
    return TEXT.format(rows="\n".join(lines), left_out="\n".join(_left_out()), notes=footnotes)


def _left_out() -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, layers in LEFT_OUT.items():
        for reason in dict.fromkeys(layers.values()):
            named = ", ".join(layer for layer in LAYERS if layers.get(layer) == reason)
            groups.setdefault((named, reason), []).append(kind)
    return (f"- {', '.join(kinds)} on {at}: {why}" for (at, why), kinds in groups.items())


def own_part() -> str:
    """The document without the part that `test_peft_types` writes."""
    return DOCUMENT.read_text().partition(MARK)[0]


def documented() -> dict[tuple[str, str], Row]:
    """The rows that the document holds, its footnotes put back."""
    document = own_part()
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", document, re.MULTILINE))
    table = [line[2:-2].split(" | ") for line in document.splitlines() if line.startswith("| ")]
    rows = {}
    for kind, layer, *cells in table[1:]:
        pairs = [cell.rstrip("]").partition("[^") for cell in cells]
        rows[kind, layer] = tuple(
            f"{w}: {notes[number]}" if number else w for w, _, number in pairs
        )
    return rows


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_the_document_has_what_was_measured(kind: str, layer: str, tmp_path: Path) -> None:
    assert documented()[kind, layer] == row_of(kind, layer, tmp_path)


def test_the_document_has_these_rows_and_no_others() -> None:
    rows = documented()
    assert list(rows) == CASES
    assert own_part() == written(rows)


def main() -> None:
    """Measures every row and writes the document."""
    torch.set_num_threads(1)
    rows = {}
    for kind, layer in CASES:
        with tempfile.TemporaryDirectory() as directory:
            rows[kind, layer] = row_of(kind, layer, Path(directory))
        print(f"{len(rows)} of {len(CASES)}: {kind} on {layer}")
    rest = DOCUMENT.read_text().partition(MARK)
    DOCUMENT.write_text(written(rows) + "".join(rest[1:]))


if __name__ == "__main__":
    main()
