"""A random update of every kind for a layer of any shape."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.adapter import AnyUpdate, Update
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord
from lora_fx.kinds import KINDS
from lora_fx.kinds.lokr import split
from lora_fx.kinds.loralib import block_diagonal

RANK, ALPHA = 2, 3.0


@dataclass(frozen=True)
class LayerShape:
    """What an update must know of its layer.

    Attributes:
        shape: of the weight, (out, in of a group, *kernel); of a table, (features, entries); of
            experts, (experts, out, in).
        groups: of a convolution.
        is_table: whether it is an embedding.
        path: of the layer, for experts.
        make: makes a model that holds it, for experts, whose reader asks the model.
    """

    shape: tuple[int, ...]
    groups: int = 1
    is_table: bool = False
    path: str = "layer"
    make: Callable[[], nn.Module] | None = None

    @property
    def columns(self) -> int:
        """Of the weight as a matrix."""
        return torch.Size(self.shape[1:]).numel()


def update_of(kind: str, layer: LayerShape | tuple[int, ...]) -> AnyUpdate:
    """A random update of a kind, as a reader of files of that kind makes it, of rank 2.

    Args:
        kind: a key of ``UPDATES``.
        layer: the layer, or the shape of its weight.
    """
    return UPDATES[kind](layer if isinstance(layer, LayerShape) else LayerShape(layer))


def read_kind(kind: str, tensors: Mapping[str, torch.Tensor], **settings: Any) -> AnyUpdate:
    """Reads a layer's tensors by the name of their kind, and checks that they are kept.

    Raises:
        AdapterError: the reader of the kind refuses them.
    """
    assert tensors.keys() <= KINDS[kind].leaves
    update = KINDS[kind].read(tensors, settings)
    assert update.kind == kind
    assert update.stored is not None
    assert update.stored.settings == settings
    assert update.stored.tensors.keys() == tensors.keys()
    assert all(update.stored.tensors[leaf] is tensors[leaf] for leaf in tensors)
    return update


def _drawn(*shapes: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Random tensors, the same ones every time."""
    source = torch.Generator().manual_seed(3)
    return (torch.randn(*shape, generator=source) * 0.5 for shape in shapes)


def _read(kind: str, leaves: Mapping[str, tuple[int, ...]], **settings: Any) -> AnyUpdate:
    tensors = dict(zip(leaves, _drawn(*leaves.values()), strict=True))
    return read_kind(kind, tensors, **settings)


def _lora(layer: LayerShape, kind: str = "lora", vector: str = "") -> AnyUpdate:
    """In PEFT's shapes, which have all inputs of a grouped convolution in its down."""
    if layer.make is not None:
        return _of_experts(layer, layer.make(), kind)
    out, into, *kernel = layer.shape
    shapes = (RANK, into * layer.groups, *kernel), (out, RANK // layer.groups), (out,)
    down, up, third = _drawn(*shapes)
    vectors: dict[str, Any] = {vector: third.abs() + 0.5} if vector else {}
    scale = ALPHA / (RANK**0.5 if kind == "rslora" else RANK)
    stored = EMBEDDING if layer.is_table else None
    return Update(down, up, scale, kind, **vectors, stored=stored)


def _of_experts(layer: LayerShape, base: nn.Module, kind: str) -> AnyUpdate:
    """Read from a file of PEFT, whose reader alone knows how the experts are packed."""
    from safetensors.torch import save_file

    from lora_fx.formats import load_adapter

    count, out, into = layer.shape
    down, up = _drawn((RANK * count, into), (out, RANK * count))
    start = f"base_model.model.{layer.path.rpartition('.')[0]}.lora_"
    fields = f'"peft_type": "LORA", "r": {RANK}, "lora_alpha": {ALPHA}, "target_modules": []'
    rslora = f'"use_rslora": {"true" if kind == "rslora" else "false"}'
    with tempfile.TemporaryDirectory() as name:
        config = f'{{{fields}, {rslora}, "target_parameters": ["{layer.path}"]}}'
        Path(name, "adapter_config.json").write_text(config)
        tensors = {f"{start}A.weight": down, f"{start}B.weight": up}
        save_file(tensors, Path(name, "adapter_model.safetensors"))
        return load_adapter(name, name="a", base=base).updates[layer.path]


def _fused(layer: LayerShape) -> AnyUpdate:
    """Loralib's ``MergedLinear`` with the first and the last of three outputs adapted."""
    out, into = layer.shape
    down, up = _drawn((2 * RANK, into), (out // 3 * 2, RANK))
    groups = True, False, True
    settings = {"alpha": ALPHA, "r": RANK, "scale": ALPHA / RANK, "enable_lora": list(groups)}
    stored = SourceRecord({"lora_A": down, "lora_B": up}, settings)
    return Update(down, block_diagonal(up, groups), ALPHA / RANK, "fused", stored=stored)


def _adalora(layer: LayerShape) -> AnyUpdate:
    """Of three ranks one was pruned."""
    leaves = {"lora_A": (RANK, layer.columns), "lora_B": (layer.shape[0], RANK)}
    leaves["lora_E"] = RANK, 1
    settings = {"scale": ALPHA, "ranknum": 3, "alpha": ALPHA, "mask": [True, False, True]}
    return _read("adalora", leaves, **settings, shape=layer.shape)


def _vera(layer: LayerShape) -> AnyUpdate:
    out, into = layer.shape
    leaves = {"vera_lambda_b": (out,), "vera_lambda_d": (3,), "vera_A": (3, into)}
    return _read("vera", leaves | {"vera_B": (out, 3)}, r=3, shape=layer.shape)


def _loha(layer: LayerShape) -> AnyUpdate:
    sides = {"a": (layer.shape[0], RANK), "b": (RANK, layer.columns)}
    leaves = {f"hada_w{half}_{side}": sides[side] for half in "12" for side in "ab"}
    settings = {"r": RANK, "alpha": ALPHA, "scale": ALPHA / RANK, "writer": "peft"}
    return _read("loha", leaves, **settings, shape=layer.shape)


def _lokr(layer: LayerShape) -> AnyUpdate:
    """Both factors whole, cut as PEFT cuts a layer: its r is too high for low rank."""
    (a, c), (b, d) = (split(size, -1) for size in layer.shape[:2])
    settings = {"r": 8, "alpha": 4.0, "scale": 0.5, "writer": "peft", "decompose_factor": -1}
    leaves = {"lokr_w1": (a, b), "lokr_w2": (c, d, *layer.shape[2:])}
    return _read("lokr", leaves, **settings, shape=layer.shape)


def _glora(layer: LayerShape) -> AnyUpdate:
    out, into, *kernel = layer.shape
    factors = {"a1.weight": (into, RANK), "a2.weight": (RANK, into), "b1.weight": (out, RANK)}
    leaves = {**factors, "b2.weight": (RANK, into, *kernel)}
    return _read("glora", leaves, scale=ALPHA / RANK, shape=layer.shape)


def _ia3(layer: LayerShape, inputs: bool) -> AnyUpdate:
    size = layer.shape[1] * layer.groups if inputs else layer.shape[0]
    ones = [1] * (len(layer.shape) - 2)
    flat = (1, size) if inputs else (size, 1)
    return _read("ia3", {"ia3_l": (1, size, *ones) if ones else flat}, feedforward=inputs)


def _oft(layer: LayerShape) -> AnyUpdate:
    """PEFT's, and LyCORIS' of convolutions, for which PEFT's own forward is no convolution."""
    out, into, *kernel = layer.shape
    if kernel:
        return _read("oft", {"oft_blocks": (out // 2, 2, 2)}, shape=layer.shape)
    leaf, size = ("oft_embedding_R.weight", out) if layer.is_table else ("oft_R.weight", into)
    settings = {"oft_block_size": 2, "r": size // 2, "use_cayley_neumann": False}
    return _read("oft", {leaf: (size // 2, 1)}, **settings, shape=layer.shape)


def _full(layer: LayerShape) -> AnyUpdate:
    if layer.is_table:
        turned = {"diff": layer.shape[::-1]}
        return _read("full", turned, shape=layer.shape, **EMBEDDING.settings)
    leaves = {"diff": layer.shape, "diff_b": layer.shape[:1]}
    return _read("full", leaves, shape=layer.shape)


def _tokens(layer: LayerShape) -> AnyUpdate:
    leaves = {"trainable_tokens_delta": (2, layer.shape[0])}
    return _read("tokens", leaves, indices=[2, 7], shape=layer.shape)


UPDATES: dict[str, Callable[[LayerShape], AnyUpdate]] = {
    "lora": _lora,
    "rslora": lambda layer: _lora(layer, "rslora"),
    "lora_bias": lambda layer: _lora(layer, vector="bias"),
    "dora": lambda layer: _lora(layer, "dora", "magnitude"),
    "adalora": _adalora,
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "ia3": lambda layer: _ia3(layer, False),
    "ia3_in": lambda layer: _ia3(layer, True),
    "oft": _oft,
    "fused": _fused,
    "full": _full,
    "tokens": _tokens,
}
