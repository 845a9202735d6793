"""What the metadata of a diffusers file says of each component."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_fx.errors import AdapterError, within
from lora_fx.formats.peft_config import parse_config
from lora_fx.formats.peft_file import METADATA
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.io.state_dict import metadata_of
from lora_fx.io.strict_json import parse_object

Fields = Mapping[str, object]


def fields_in(file: Path) -> Fields | None:
    """The fields in the file's metadata, or None."""
    text = metadata_of(file).get(METADATA)
    if text is None:
        return None
    with within(f"{file}: {METADATA}"):
        return parse_object(text.encode())


def is_bare(fields: Fields | None) -> bool:
    """Whether one model wrote the file by itself: its fields begin with no component's name."""
    return fields is not None and "peft_type" in fields


def config_of(
    file: Path, fields: Fields | None, component: str, kind: str, strict: bool
) -> PeftConfig | None:
    """The config of one component, or None where the file has no metadata.

    Args:
        file: that holds them.
        fields: of the metadata.
        component: whose config it is; ``""`` where the file has no components.
        kind: of PEFT's types, the one that the tensors are of.
        strict: as in `parse_config`.

    Raises:
        AdapterError: the metadata has no field of the component, or one is malformed, or not
            supported.
    """
    if fields is None:
        return None
    start = f"{component}." if component else ""
    own = {key.removeprefix(start): v for key, v in fields.items() if key.startswith(start)}
    if not own:
        raise AdapterError(f"{file}: {METADATA} has no field of {component}, whose tensors it has")
    origin = f"{file}: {METADATA} of {component or 'the model'}"
    return parse_config({"peft_type": kind, **own}, origin, strict, (kind,))
