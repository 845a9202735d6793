"""A diffusers directory as its models: a pipeline's components, or one of them alone."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import LoraFxError
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.bounded_build import bounded
from lora_fx.tasks.directory import Loaded, fields_of, load_directory, loading, quiet
from lora_fx.tasks.directory_files import check_files, variant_of
from lora_fx.tasks.plain_weights import quantised_by, refuse_bytes, told_of

INDEX, CONFIG = "model_index.json", "config.json"
_CLASS = "_class_name"
# What pipelines call the models that are run for a picture; optimum loads a file of each.
_EXPORTED = re.compile(r"unet|transformer(_\d)?|vae|text_encoder(_\d)?")


@dataclass(frozen=True)
class Pipeline:
    """The models of a diffusers directory.

    Attributes:
        path: the directory.
        models: name of the component -> its model, in eval mode; of a component alone, one of them.
        fields: of ``model_index.json``; empty for a component alone.
    """

    path: Path
    models: Mapping[str, Loaded]
    fields: Mapping[str, Any]

    def home(self, component: str) -> Path:
        """The directory of a component."""
        return self.path / component if self.fields else self.path

    def kind(self) -> Any:
        """The class of the pipeline, or None if diffusers has none of its name."""
        import diffusers

        return getattr(diffusers, str(self.fields.get(_CLASS)), None)


def is_pipeline(path: Path) -> bool:
    """Whether a directory is a pipeline of diffusers, or one of its own models."""
    return (path / INDEX).is_file() or _CLASS in fields_of(path / CONFIG)


def load_pipeline(
    path: Path, component: str | None = None, dtype: Any = None, every: bool = False
) -> Pipeline:
    """Loads the models of a diffusers directory that are exported.

    An adapter's names mean layers of all of a pipeline's models: the others can come without their
    values, which takes neither time nor memory.

    Args:
        path: holds ``model_index.json``, or ``config.json`` and weights of a model of diffusers.
        component: the one that is meant; by default all.
        dtype: what they are loaded in; by default what diffusers loads them in.
        every: have the others too, on the meta device.

    Raises:
        LoraFxError: it is no such directory, has no such component, or diffusers cannot load it.
    """
    fields = fields_of(path / INDEX)
    diffusers = _imported(path)
    with quiet(diffusers.utils.logging), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that diffusers uses itself
        if not fields:
            model = _load_own(path, dtype, diffusers)
            return Pipeline(path, {_role(path, model.model): model}, {})
        names = [name for name, entry in fields.items() if _is_exported(name, entry)]
        if not names or component not in (None, *names):
            raise LoraFxError(
                f"{path}: has no {component or 'model'} to export; of its components these can be: "
                f"{', '.join(names) or 'none'}"
            )
        models = {
            name: _loaded(path / name, dtype, diffusers)
            if component in (None, name)
            else _outlined(path / name, diffusers)
            for name in names
            if every or component in (None, name)
        }
        return Pipeline(path, models, fields)


def _imported(path: Path) -> Any:
    """diffusers, which looks for image processors when it is imported and says what it lacks."""
    try:
        import transformers

        with quiet(transformers.utils.logging):
            import diffusers.pipelines.auto_pipeline
    except ImportError as error:
        raise LoraFxError(f"{path}: reading it needs diffusers: pip install diffusers") from error
    return diffusers


def _is_exported(name: str, entry: Any) -> bool:
    is_there = isinstance(entry, list) and len(entry) == 2 and None not in entry
    return is_there and _EXPORTED.fullmatch(name) is not None


def _loaded(path: Path, dtype: Any, diffusers: Any) -> Loaded:
    if _CLASS in fields_of(path / CONFIG):
        return _load_own(path, dtype, diffusers)
    return load_directory(path, AdapterTask(), dtype=dtype)


def _outlined(path: Path, diffusers: Any) -> Loaded:
    """A model's layers without their values."""
    if _CLASS not in fields_of(path / CONFIG):
        return load_directory(path, AdapterTask(), values=False)
    check_files(path)
    kind = _own_class(path, diffusers)
    with loading(path, "diffusers"):
        return Loaded(_outline(kind, path).eval(), ())


def _outline(kind: Any, path: Path) -> Any:
    with bounded(path), torch.device("meta"):
        return kind.from_config(kind.load_config(path))


def _load_own(path: Path, dtype: Any, diffusers: Any) -> Loaded:
    """A model of diffusers' own classes."""
    check_files(path)
    kind = _own_class(path, diffusers)
    with told_of(quantised_by(path)), loading(path, "diffusers"):
        _outline(kind, path)
        model, told = kind.from_pretrained(
            path, torch_dtype=dtype, variant=variant_of(path), local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    refuse_bytes(path, model, told["unexpected_keys"])
    lacks = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}
    return Loaded(model.eval(), tuple(sorted(lacks)))


def _own_class(path: Path, diffusers: Any) -> Any:
    name = fields_of(path / CONFIG).get(_CLASS)
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise LoraFxError(
            f"{path}: its config.json names the class {name!r:.80}, which is no model of diffusers "
            f"{diffusers.__version__}"
        )
    return kind


def _role(path: Path, model: Any) -> str:
    """What a pipeline would call a model: as its directory is called, or by what it takes."""
    if hasattr(model, "encode") and hasattr(model, "decode"):
        return "vae"
    if _EXPORTED.fullmatch(path.name):
        return path.name
    return "unet" if "sample" in inspect.signature(model.forward).parameters else "transformer"
