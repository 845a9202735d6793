"""State dicts of models that PEFT wrapped, as ``torch.save(model.state_dict())`` leaves them.

Their keys have the adapter's name in them, and beside its tensors stand those of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from lora_fx.errors import AdapterError, shorten

_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."
_ROWS = ".trainable_tokens_original"
_PARAMETERS = ("weight", "bias")


def as_saved(
    tensors: Mapping[str, torch.Tensor], is_known: Callable[[str], bool]
) -> Mapping[str, torch.Tensor]:
    """The tensors by the keys that PEFT saves them under; a file of PEFT's is left as it is.

    What PEFT keeps of a module or of rows beside those that an adapter trains is left out: nothing
    reads it.

    Args:
        tensors: by key.
        is_known: whether a key is one of an adapter's own, as PEFT saves it.

    Raises:
        AdapterError: there are several adapters in it; names them.
    """
    short = {key: found for key in tensors if (found := _shortened(key, is_known))}
    if not short or any(map(is_known, tensors)):
        return tensors
    names = sorted({name for name, _ in short.values()})
    if len(names) > 1:
        raise AdapterError(
            f"the state dict of a model with the adapters {shorten(names)}, expected one: save the "
            "one that is meant by itself, as save_pretrained does"
        )
    [name] = names
    saved = saved_in(tensors)
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        module = key.partition(_ORIGINAL)[0]
        if (module != key and module in saved) or key.endswith(f"{_ROWS}.{name}"):
            continue
        plain = short[key][1] if key in short else key.replace(f"{_COPY}{name}.", ".")
        result[plain] = tensor
    return result


def saved_in(keys: Iterable[str]) -> set[str]:
    """The paths of the modules that an adapter holds whole, told by its state dict's keys."""
    return {key.partition(_COPY)[0] for key in keys if _COPY in key}


def _shortened(key: str, is_known: Callable[[str], bool]) -> tuple[str, str] | None:
    """The adapter's name in a key, and the key without it; None of what is none of its own."""
    for name, plain in _without_one(key.split(".")):
        if name not in _PARAMETERS and is_known(plain):
            return name, plain
    return None


def _without_one(parts: list[str]) -> Iterator[tuple[str, str]]:
    """What may be a name, and the rest; a vector of its own module loses its weight in files."""
    *rest, last = parts
    yield last, ".".join(rest)
    if rest and last in _PARAMETERS:
        *start, name = rest
        yield name, ".".join([*start, last])
        yield name, ".".join(start)
