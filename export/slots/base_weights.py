"""The weights of a swappable model, read back from its file: what DoRA's norm is taken of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import torch

from lora_fx.errors import AdapterError
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import load_proto
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.onnx_model.tensors import digest_of, to_torch
from lora_fx.export.rewriting.dequantize import in_few_bits, weight_and_step
from lora_fx.export.rewriting.layer_names import path_of
from lora_fx.export.slots.slot import Slot


class BaseWeights:
    """The constants of a model file: each is read when asked for, and told by its digest.

    Args:
        path: the ``.onnx`` file, opened when the first constant is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _model(self) -> ir.Model:
        check_external_data(load_proto(self._path), self._path)
        return parsed_file(self._path)

    @property
    def _values(self) -> Mapping[str, ir.Value]:
        return self._model.graph.initializers

    def weight(self, slot: Slot) -> torch.Tensor:
        """W of a slot's layer, as the layer stores it.

        Raises:
            AdapterError: no constant of the file is this weight.
            ExportError: the file is damaged.
        """
        return self.tensor(f"{slot.path}.weight", slot.layer.stored_shape, slot.digest)

    def bias(self, slot: Slot) -> torch.Tensor | None:
        """The bias of a slot's layer, (out,), or None if it has none.

        Raises:
            AdapterError: no constant of the file is this bias.
        """
        if not slot.bias_digest:
            return None
        return self.tensor(f"{slot.path}.bias", (slot.out_features,), slot.bias_digest)

    def tensor(self, name: str, shape: tuple[int, ...], digest: str) -> torch.Tensor:
        """A tensor as the model stores it.

        Raises:
            AdapterError: no constant of the file is this tensor.
        """
        found = self._find(name, shape, digest)
        if found is None:
            raise AdapterError(
                f"{self._path}: {name} is not among the model's constants as it was exported; "
                "export the model again"
            )
        return found

    def holds(self, name: str, value: torch.Tensor) -> bool:
        """Whether the constant of a name has these values, and not another one."""
        tensor = self._values[name].const_value if name in self._values else None
        return tensor is not None and (
            _as_stored(to_torch(tensor), tuple(value.shape), digest_of(value)) is not None
        )

    def _find(self, name: str, shape: tuple[int, ...], digest: str) -> torch.Tensor | None:
        for tensor in self._candidates(name, math.prod(shape)):
            if (held := _as_stored(tensor, shape, digest)) is not None:
                return held
        return None

    def _candidates(self, name: str, size: int) -> Iterator[torch.Tensor]:
        """The constants of a size, that of a name first: a shared one bears another's.

        Then the weights that are stored in a few bits, as numbers.
        """
        named = sorted(self._values.items(), key=lambda item: item[0] != name)
        for _, value in named:
            tensor = value.const_value
            if tensor is not None and tensor.size == size:
                yield to_torch(tensor)
        packed = [layer for layer in in_few_bits(self._model) if math.prod(layer.shape) == size]
        for layer in sorted(packed, key=lambda layer: f"{path_of(layer)}.weight" != name):
            yield torch.from_numpy(weight_and_step(layer.node)[0])


def _as_stored(tensor: torch.Tensor, shape: tuple[int, ...], digest: str) -> torch.Tensor | None:
    """A constant the way the model stores it, if it is what was exported.

    The exporter may have stored a matrix the other way round.
    """
    for held in (tensor, tensor.T if tensor.ndim == 2 else None):
        if held is not None and held.shape == shape and digest_of(held) == digest:
            return held.contiguous()
    return None
