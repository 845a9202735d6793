"""A Hugging Face directory as a model: the class that it is of, with every weight it needs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import AdapterWarning, LoraFxError, shorten, within
from lora_fx.io.strict_json import read_json
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.bounded_build import bounded
from lora_fx.tasks.calls import Prepared
from lora_fx.tasks.directory_files import check_alone, check_files, variant_of, without_adapter
from lora_fx.tasks.example_inputs import with_parts
from lora_fx.tasks.plain_weights import (
    OURS,
    plain_weights,
    quantised_by,
    refuse_bytes,
    refuse_packed,
    told_of,
)
from lora_fx.tasks.table import Task, task_of, task_of_adapters
from lora_fx.tasks.vocabulary import fit_vocabulary

_HERE = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Loaded:
    """A model of transformers, in eval mode.

    Attributes:
        model: the model.
        lacks: the parameters that its directory has no values for.
        task: what it is for; None if it is of no task here.
        stored: what its weights were numbers of, ``"nf4:64"``, if bitsandbytes had stored them.
    """

    model: Any
    lacks: tuple[str, ...]
    task: Task | None = None
    stored: str | None = None


def load_directory(
    path: Path,
    adapters: AdapterTask,
    task: Task | None = None,
    dtype: torch.dtype | None = None,
    values: bool = True,
) -> Loaded:
    """Loads the model of a directory, of the class that its task needs.

    Args:
        path: holds ``config.json`` and weights.
        adapters: what they were trained for, and the shapes of their heads.
        task: what the model is for. By default that of the adapters, or else what the directory's
            own class does.
        dtype: what it is loaded in; by default that of its weights, and float32 where bitsandbytes
            quantised them.
        values: load them; without, all is on the meta device.

    Raises:
        LoraFxError: it is no model, or transformers cannot load it.
    """
    check_alone(path, adapters.paths)
    if not (path / "config.json").is_file():
        raise LoraFxError(f"{path}: holds no config.json, so it is no Hugging Face model")
    check_files(path)
    try:
        import transformers
    except ImportError as error:
        raise LoraFxError(
            f"{path}: reading it needs transformers: pip install lora-fx[hf]"
        ) from error
    with quiet(transformers.utils.logging), without_adapter(path) as place:
        config, kind = _config_and_class(path, place, adapters, task, transformers)
        if not values:
            with loading(path, "transformers"), bounded(path), torch.device("meta"):
                return Loaded(kind(config).eval(), ())
        return _load(path, place, kind, config, adapters, task, dtype)


def _config_and_class(
    path: Path, place: Path, adapters: AdapterTask, task: Task | None, transformers: Any
) -> tuple[Any, Any]:
    try:
        config = transformers.AutoConfig.from_pretrained(place, **_HERE)
    except Exception as error:  # a config may hold anything
        raise LoraFxError(f"{path}: transformers cannot read its config.json: {error}") from error
    with within(path), bounded(path):
        kind = _class_of(config, adapters, task, transformers)
    for part in with_parts(config):
        part.use_cache = False
    return config, kind


@contextmanager
def loading(path: Path, library: str) -> Iterator[None]:
    """Whatever a library raises of a directory, as our own error: a config may hold anything."""
    try:
        yield
    except LoraFxError:
        raise
    except Exception as error:
        raise LoraFxError(f"{path}: {library} cannot load it: {error}") from error


def _load(
    path: Path,
    place: Path,
    kind: Any,
    config: Any,
    adapters: AdapterTask,
    task: Task | None,
    dtype: torch.dtype | None,
) -> Loaded:
    method = quantised_by(place)
    with (
        told_of(None if method == OURS else method),
        loading(path, "transformers"),
        bounded(path),
        _readable(place, kind, config, method) as (place, stored, own),
    ):
        model, told = kind.from_pretrained(
            place,
            config=config,
            ignore_mismatched_sizes=True,  # they are refused below, unless an adapter has them
            output_loading_info=True,
            dtype=dtype or own,
            variant=variant_of(place),
            **_HERE,
        )
        if method not in (None, OURS):
            with within(path), torch.device("meta"):
                refuse_packed(model, kind(config))
    refuse_bytes(path, model, told["unexpected_keys"])
    if told["unexpected_keys"]:
        warnings.warn(
            f"{path}: a {kind.__name__} has no place for {shorten(sorted(told['unexpected_keys']))}"
            ", which are left out",
            AdapterWarning,
            stacklevel=6,
        )
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("batched_mm")  # the one whose operators ONNX has
    lacks = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}
    with within(path):
        lacks |= {*fit_vocabulary(model, adapters.shapes)}
    found = task or _task(kind, config, adapters)
    return Loaded(model.eval(), tuple(sorted(lacks)), found, stored)


@contextmanager
def _readable(
    place: Path, kind: Any, config: Any, method: str | None
) -> Iterator[tuple[Path, str | None, torch.dtype | str]]:
    """A directory that transformers reads, what its weights are numbers of, and their type."""
    if method != OURS:
        yield place, None, "auto"
        return
    from transformers.pytorch_utils import Conv1D

    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        layers = kind(config).named_modules()
    turned = [path for path, module in layers if isinstance(module, Conv1D)]
    with plain_weights(place, turned) as (plain, stored):
        yield plain, stored, torch.float32  # the only type that has all the numbers


def _task(kind: type, config: Any, adapters: AdapterTask) -> Task | None:
    """The task of the adapters; how a model generates, its own class says."""
    asked, own = task_of_adapters(adapters.name), task_of(kind, config)
    return own if asked is None or (own and own.generates and asked.generates) else asked


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Shows neither a bar nor the report of a load: what it would warn of, we say ourselves."""
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def refuse_lacking(lacks: Collection[str], replaced: Collection[str]) -> None:
    """Refuses parameters that neither a directory nor an adapter has values for.

    Raises:
        LoraFxError: names them.
    """
    missing = [name for name in lacks if name not in replaced]
    if missing:
        raise LoraFxError(
            f"holds no weights, or weights of another shape, for {shorten(missing)}: they "
            "would be random numbers. Save the model whole, name the class that was saved in "
            "config.json's architectures, or give the adapter whose modules_to_save hold them"
        )


def prepared_by(path: Path, config: Any) -> Prepared:
    """What a directory's tokenizer gives a model, and how its images or sounds are prepared.

    Without a word of the directory's own, both are those that transformers has for the model.
    """
    import transformers

    prepared = fields_of(path / "preprocessor_config.json")
    names: list[object] = []
    for said in (fields_of(path / "tokenizer_config.json"), prepared):
        found = said.get("model_input_names")
        names += found if isinstance(found, list) else []
    if not names:
        for tokenizer in _known(transformers.TOKENIZER_MAPPING, config):
            with suppress(ImportError):  # it stands for a class of a package that is not there
                names += getattr(tokenizer, "model_input_names", [])
    if not prepared:
        for processor in _known(transformers.IMAGE_PROCESSOR_MAPPING, config):
            with suppress(ImportError):
                prepared |= {n: getattr(processor, n, None) for n in ("size", "crop_size")}
    return Prepared([name for name in names if isinstance(name, str)], prepared)


def _known(mapping: Any, config: Any) -> list[Any]:
    """The classes that transformers has for a config, in what it calls a mapping."""
    found = mapping.get(type(config), ())
    kinds = found.values() if isinstance(found, Mapping) else found
    return list(kinds) if isinstance(kinds, Iterable) else [kinds]


def fields_of(file: Path) -> dict[str, Any]:
    """The fields of a JSON file of a directory; none where there is none.

    Raises:
        LoraFxError: it cannot be read.
    """
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _class_of(config: Any, adapters: AdapterTask, task: Task | None, transformers: Any) -> Any:
    said = config.architectures if isinstance(config.architectures, list) else []
    names = [name for name in said if isinstance(name, str)]
    own: Any = getattr(transformers, names[0], None) if names else None
    is_model = isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
    is_model = is_model and own.config_class is not None  # not the base of all models
    wanted = task or task_of_adapters(adapters.name)
    if wanted is not None and not (is_model and wanted.is_done_by(own, config)):
        return _class_for(config, wanted, adapters)
    if not names:
        raise LoraFxError(
            "config.json names no architectures, so the class of the model is unknown: "
            'add it, such as "architectures": ["BertModel"], or give --task, or module:function'
        )
    if not is_model:
        raise LoraFxError(
            f"config.json names the architecture {names[0]!r:.80}, which is no model of "
            f"transformers {transformers.__version__}: correct it, or give module:function"
        )
    return own


def _class_for(config: Any, task: Task, adapters: AdapterTask) -> type[Any]:
    found = task.classes(config)
    if not found:
        asked = adapters.name is not None and task_of_adapters(adapters.name) is task
        who = f"the adapter's task_type is {adapters.name}" if asked else f"the task is {task.name}"
        raise LoraFxError(
            f"{who}, which needs transformers' {' or '.join(task.autos)}, and that has no class "
            f"for a {config.model_type}: name the base that the adapter was trained on, another "
            "task, or module:function"
        )
    labels = _labels(found[0], config, adapters)
    if labels is not None:
        config.num_labels = labels
    return found[0]


def _labels(kind: Any, config: Any, adapters: AdapterTask) -> int | None:
    """How many labels the head in the adapter's file has: by the axes that follow the count."""
    few, many = (_meta_shapes(kind, config, count) for count in (3, 5))
    found = {
        adapters.shapes[name][axis]
        for name, shape in few.items()
        if name in adapters.shapes and len(adapters.shapes[name]) == len(shape)
        for axis in range(len(shape))
        if (shape[axis], many[name][axis]) == (3, 5)
    }
    if len(found) > 1:
        raise LoraFxError(f"the adapter's heads are for {sorted(found)} labels")
    return next(iter(found), None)


def _meta_shapes(kind: Any, config: Any, labels: int) -> dict[str, tuple[int, ...]]:
    try:
        config = type(config).from_dict(config.to_dict())
        config.num_labels = labels
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in kind(config).named_parameters()}
    except LoraFxError:
        raise
    except Exception as error:  # a config may hold anything
        raise LoraFxError(f"config.json does not describe a {kind.__name__}: {error}") from error
