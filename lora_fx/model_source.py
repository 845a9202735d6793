"""What the command line takes as a model: a directory, a function, or an exported program."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.user_code import load_module, users_code

_FORMS = "expected a Hugging Face directory, module:function, file.py:function, or a .pt2 file"


@dataclass(frozen=True)
class ModelSource:
    """A model with the inputs to trace it with.

    Attributes:
        model: a module in eval mode, or a program that remembers its inputs.
        args: example inputs by position.
        kwargs: example inputs by name.
        dynamic_shapes: as `lora_fx.trace` takes it.
    """

    model: nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None


def find_model(spec: str) -> ModelSource:
    """Loads the model that a command line names.

    Args:
        spec: a Hugging Face directory, ``module:function`` or ``file.py:function`` whose function
            returns ``(model, args, kwargs, dynamic_shapes)`` (later ones optional), or a ``.pt2``
            file.

    Raises:
        LoraFxError: it is none of these, or it cannot be loaded.
    """
    path = Path(spec)
    if path.is_dir():
        return _from_directory(path)
    if path.suffix == ".pt2":
        return _from_program(path)
    if ":" in spec:
        return _from_function(spec)
    raise LoraFxError(f"{spec}: no such directory or file; {_FORMS}")


def _from_program(path: Path) -> ModelSource:
    if not path.is_file():
        raise LoraFxError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):  # torch would print a traceback before it raises
        raise LoraFxError(f"{path}: is damaged or no program: write it with torch.export.save")
    try:
        return ModelSource(torch.export.load(path))
    except Exception as error:  # what is damaged in it decides what torch raises
        raise LoraFxError(
            f"{path}: torch.export.load cannot read it ({error}): write it with torch.export.save"
        ) from error


def _from_function(spec: str) -> ModelSource:
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise LoraFxError(f"{place}: no such file; {_FORMS}")
    with users_code(f"{spec}: {place} cannot be imported"):
        module = load_module(place)
    with users_code(spec):
        function = getattr(module, name, None)
    if function is None:
        raise LoraFxError(f"{spec}: {place} has no function {name!r}; {_FORMS}")
    if not callable(function):
        raise LoraFxError(f"{spec}: found a {type(function).__name__}, expected a function")
    with users_code(spec):
        returned = function()
    return _checked(spec, returned)


def _checked(spec: str, returned: Any) -> ModelSource:
    parts = returned if isinstance(returned, tuple) else (returned,)
    model, args, kwargs, shapes = (*parts, *(None,) * 4)[:4]
    if len(parts) > 4 or not isinstance(model, nn.Module | torch.export.ExportedProgram):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise LoraFxError(
            f"{spec}: returned ({kinds}), expected (model, args, kwargs, dynamic_shapes), "
            "the later ones optional"
        )
    if not isinstance(args, tuple | None) or not isinstance(kwargs, Mapping | None):
        raise LoraFxError(f"{spec}: args must be a tuple and kwargs a mapping of example inputs")
    return ModelSource(model, args or (), kwargs or {}, shapes)


def _from_directory(path: Path) -> ModelSource:
    if (path / "adapter_config.json").is_file():
        raise LoraFxError(f"{path}: this is an adapter; name its base model, and it as --adapter")
    if not (path / "config.json").is_file():
        raise LoraFxError(f"{path}: holds no config.json, so it is no Hugging Face model")
    try:
        import transformers
    except ImportError as error:
        raise LoraFxError(
            f"{path}: reading it needs transformers: pip install lora-fx[demo]"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        config.use_cache = False
        name = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, name, transformers.AutoModel)
        model = kind.from_pretrained(path, config=config, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LoraFxError(f"{path}: transformers cannot load it: {error}") from error
    kwargs, shapes = example_inputs(config, str(path))
    return ModelSource(model.eval(), (), kwargs, shapes)


def example_inputs(config: Any, where: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs made from a transformers config, with named dynamic axes.

    Text models get ``input_ids`` and ``attention_mask`` of (2, 16), encoder-decoders the
    decoder's too, image models ``pixel_values`` of two images.

    Raises:
        LoraFxError: the config says neither a vocabulary nor an image size.
    """
    source = torch.Generator().manual_seed(0)
    if isinstance(getattr(config, "vocab_size", None), int):
        return _text_inputs(config, source)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        pixels = torch.randn(2, config.num_channels, size, size, generator=source)
        return {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}
    raise LoraFxError(
        f"{where}: no example inputs can be made for a {config.model_type}: give module:function"
    )


def _text_inputs(
    config: Any, source: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    ids = torch.randint(0, config.vocab_size, (2, 16), generator=source)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0  # padding, so that a graph which ignores the mask is found out
    inputs = {"input_ids": ids, "attention_mask": mask}
    shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :8].clone()
        shapes["decoder_input_ids"] = {0: "batch", 1: "decoder_sequence"}
    return inputs, shapes
