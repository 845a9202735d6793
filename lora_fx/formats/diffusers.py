"""diffusers' ``pytorch_lora_weights``: the adapters of a pipeline's models, or of one model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.parameter_updates import name_of
from lora_fx.adapters.source_record import is_told
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats import dialects
from lora_fx.formats.dialects import ALPHA, Contents, Dialect, Layers, Tensors, tensors_of
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft import METADATA, fields_in
from lora_fx.formats.peft.config import PeftConfig
from lora_fx.formats.peft.fields import Fields, dump, parse
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.formats.peft.lora import LEAVES, LoraConfig
from lora_fx.formats.peft.products import LokrConfig
from lora_fx.formats.peft.write import PeftLayout, as_lora, config_of
from lora_fx.io.state_dict import read_file
from lora_fx.kinds import KINDS, lokr, lora
from lora_fx.kinds.lora import DOWN, MAGNITUDE, UP
from lora_fx.layers.pipeline_names import PREFIXES

Said = Mapping[str, object] | None  # the fields of the metadata
Part = tuple[dict[str, AnyUpdate], TargetRule | None]
NAME = "diffusers' format"
FACTOR = "decompose_factor"  # of a LoKr config: PEFT cannot do without
WEIGHTS, PICKLE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
_FORM = lora.Form(is_exact=False, is_grouped=True)
COMPONENTS = (
    "unet", "transformer", "transformer_2", "transformer_ref", "text_encoder", "text_encoder_2",
    "text_encoder_3", "text_conditioner", "connectors",
)  # fmt: skip
LOKR, LYCORIS = lokr.MARKS, {*KINDS["loha"].leaves, "diff", "diff_b", "magnitude"} - {ALPHA}
_PREFIX = rf"({'|'.join(COMPONENTS)})\."
# Names that PEFT alone would give a layer too.
_OF_PEFT = {f".{leaf}": role for role, leaf in LEAVES.items()}
ENDINGS = {
    **_OF_PEFT,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".alpha": ALPHA,
    **{f".{leaf}": leaf for leaf in sorted(LOKR)},
}
# The parts of a path that only diffusers has.
_OWN_PARTS = re.compile(
    r"^(unet|transformer_2|transformer_ref|text_conditioner|connectors)\."
    r"|\.(\w+_)?transformer_blocks\.|\.(add_|to_)(q|k|v|out|qkv)(_proj)?\."
    r"|^text_encoder(_[23])?\."
)


def _dialect(prefix: str, **names: str) -> Dialect:
    """The spelling of one model, with what its attention calls the projections.

    The oldest spelling names these as if every model's were called alike.
    """
    # Beside the factors, a magnitude is of what diffusers makes of their names too.
    ends = {"_lora.down.weight": DOWN, "_lora.up.weight": UP, ".lora_magnitude_vector": MAGNITUDE}
    older = {
        f".to_{old}{end}": (f".{new}", role)
        for end, role in ends.items()
        for old, new in names.items()
    }
    return Dialect(
        ENDINGS,
        f"one of {', '.join(COMPONENTS)}, a path, and an ending such as .lora_A.weight, "
        ".lora.down.weight or .alpha",
        prefix=prefix,
        older=older,
        silent="processor",
    )


MODEL = _dialect(_PREFIX, q="to_q", k="to_k", v="to_v", out="to_out.0")
TEXT = _dialect(_PREFIX, q="q_proj", k="k_proj", v="v_proj", out="out_proj")
BARE = _dialect("", q="to_q", k="to_k", v="to_v", out="to_out.0")


def is_diffusers(path: Path, names: Collection[str]) -> bool:
    """Whether a file is diffusers' by name, keys or metadata."""
    fields, is_called = fields_in(path), path.name in (WEIGHTS, PICKLE)
    is_lora = any(n.endswith(tuple(ENDINGS)) and not n.startswith(PREFIX) for n in names)
    if is_lora and (fields is not None or (is_called and not _is_of_lycoris(names))):
        return True
    speaks = speaks_diffusers(names)
    if speaks is None and fields is None:
        raise AdapterError(
            f"{path}: its keys begin with transformer. and end as PEFT's do, and nothing says what "
            "the scale is: a part of a pipeline has 1 in diffusers' format, a language model that "
            'PEFT trained has alpha / r; pass format="diffusers" for the one, or save the other '
            "with PEFT, which puts base_model.model. in front and a config beside it"
        )
    return speaks is not False


def weights_in(directory: Path) -> Path | None:
    """The file of a directory that holds diffusers' adapters; None where there is none."""
    files = (directory / name for name in (WEIGHTS, PICKLE))
    return next((file for file in files if file.exists()), None)


def read_diffusers(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads a file of diffusers': every key is used, or refused by name.

    LoRA and DoRA of linear and convolution layers, and LoKr. Scales come from the config in the
    file's metadata, or from ``.alpha`` tensors over the rank; without either a scale is 1.
    ``component`` reads one model's part and leaves the others out; without, paths keep the
    component's name at the front, as in the pipeline. A file that one model wrote by itself
    (``save_lora_adapter``, or ``save_attn_procs`` of old) has no components.
    """
    file = weights_in(path) or path
    fields = fields_in(file)
    tensors = read_file(file, hints.allow_pickle)
    bare = has_no_component(tensors) if fields is None else "peft_type" in fields
    with within(file):
        components = sort_by_component(tensors, bare)
        if hints.component is not None and not bare:
            if hints.component not in tuple(components):
                there = ", ".join(components) or "none"
                raise AdapterError(f"component is {hints.component!r:.80}, the file has {there}")
            components = {hints.component: components[hints.component]}
    updates: dict[str, AnyUpdate] = {}
    rule = None
    for component, layers in (components or {"": {}}).items():
        found, own_rule = updates_of(file, layers, fields, component, hints.strict)
        if hints.component is not None or bare:
            updates, rule = found, own_rule
        else:
            updates |= {f"{component}.{p}": update for p, update in found.items()}
    return Adapter(name, updates, expects=rule)


def updates_of(file: Path, layers: Layers, fields: Said, component: str, strict: bool) -> Part:
    """The updates of one component, and which layers its config says it adapts."""
    own = [path for path, roles in layers.items() if roles.keys() & LOKR]
    if own and len(own) < len(layers):
        raise AdapterError(f"{file}: {own[0]} is LoKr, other layers of {component} are LoRA")
    config: Any = None
    if fields is not None:
        made: type[PeftConfig] = LokrConfig if own else LoraConfig
        start, kind = f"{component}." if component else "", made.peft_type
        said = {key.removeprefix(start): v for key, v in fields.items() if key.startswith(start)}
        if not said:
            raise AdapterError(
                f"{file}: {METADATA} has no field of {component}, whose tensors it has"
            )
        origin = f"{file}: {METADATA} of {component or 'the model'}"
        config = parse({"peft_type": kind, **said}, origin, strict, {kind: made})
    with within(file):
        dialects.check_adapted(layers)
        updates = (_lokr_updates if own else _lora_updates)(layers, config)
    return updates, None if config is None else config.rule


def _lora_updates(layers: Layers, config: LoraConfig | None) -> dict[str, AnyUpdate]:
    """LoRA or DoRA of every layer of a component; PEFT's one config is of all of them."""
    optional = {ALPHA: ".alpha", MAGNITUDE: "a magnitude", lora.BIAS: "a bias of its up-projection"}
    for role, what in optional.items():
        having = [path for path, roles in layers.items() if role in roles]
        lacking = [path for path, roles in layers.items() if role not in roles]
        if having and lacking:
            raise AdapterError(
                f"{shorten(having)} has {what}, {shorten(lacking)} has none; a file has it for all "
                "layers or for none"
            )
    there = next(iter(layers.values()))
    if config is not None and ALPHA in there:
        raise AdapterError(
            f".alpha for {shorten([*layers])}, and a config in {METADATA}; which holds?"
        )
    if config is not None and config.use_dora != (MAGNITUDE in there):
        found = "lacks" if config.use_dora else "has"
        raise AdapterError(
            f"use_dora is {config.use_dora} in {METADATA}, the file {found} magnitudes"
        )
    updates: dict[str, AnyUpdate] = {}
    for path, roles in layers.items():
        with within(path):
            if config is None:
                updates[path] = lora.read(roles, _FORM, alpha=dialects.scalar_of(roles))
                continue
            rank, scale = config.rank_and_scale(path)
            said, root = (rank, METADATA), config.use_rslora
            updates[path] = lora.read(roles, _FORM, scale=scale, rank=said, use_rslora=root)
    return updates


def _lokr_updates(layers: Layers, config: LokrConfig | None) -> dict[str, AnyUpdate]:
    """LoKr of every layer of a component; without a config alpha is in the weights already.

    Source: ``_create_lokr_config`` of diffusers 0.42.
    """
    updates = {}
    for path, roles in layers.items():
        with within(path):
            extra = sorted(roles.keys() - LOKR)
            if extra:
                raise AdapterError(f"{roles[extra[0]][0]!r} stands beside LoKr's tensors")
            tensors, plain = tensors_of(roles), {"scale": 1.0, "writer": "peft"}
            settings = plain if config is None else config.settings(path, tensors)
            updates[path] = KINDS["lokr"].read(tensors, settings)
    return updates


def has_no_component(names: Iterable[str]) -> bool:
    """Whether the keys are the paths of one model: none begins with a component's name."""
    return not any(re.match(_PREFIX, name) for name in names)


def speaks_diffusers(names: Collection[str]) -> bool | None:
    """Whether tensors are named as diffusers alone names them; None where PEFT's dumps may be.

    A file of ``transformer.<path>.lora_A.weight`` and nothing else may be either's, with another
    scale each: a language model's transformer is called that too.
    """
    if _is_of_lycoris(names):
        return False
    if has_no_component(names) and any(name.endswith(tuple(BARE.older)) for name in names):
        return True  # of a model's attention processors, saved by itself
    split = {name: MODEL.split(name) for name in names}
    named = [name for name, found in split.items() if found is not None and found[1] != ALPHA]
    if not named:
        return False
    is_own = any(not n.endswith(tuple(_OF_PEFT)) or _OWN_PARTS.search(n) for n in named)
    return True if is_own or any(name.endswith(".alpha") for name in names) else None


def _is_of_lycoris(names: Collection[str]) -> bool:
    """Whether tensors are what kohya's scripts and LyCORIS write, whatever the file is called."""
    ends = {name.rpartition(".")[2] for name in names}
    is_own = not ends.isdisjoint(LYCORIS) or (ALPHA in ends and not ends.isdisjoint(LOKR))
    return is_own or any(name.startswith(tuple(PREFIXES.values())) for name in names)


def sort_by_component(tensors: Tensors, bare: bool = False) -> dict[str, Layers]:
    """Sorts every tensor by component, layer and role; all are of ``""`` where none begins so."""
    if bare:
        return {"": dialects.sort_keys(tensors, BARE)} if tensors else {}
    components: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        components.setdefault(key.partition(".")[0], {})[key] = tensor
    return {
        component: dialects.sort_keys(own, TEXT if component.startswith("text_encoder") else MODEL)
        for component, own in components.items()
    }


def contents(adapter: Adapter, path: Path, hints: Hints) -> Contents:
    """A file that diffusers' pipelines load, with its ``LoraConfig`` in the metadata.

    ``component`` says what the paths are of; without, each begins with a component's name. A
    pipeline looks for ``pytorch_lora_weights.safetensors``.
    """
    component = hints.component
    dialects.check_held(adapter, NAME, adapter.replacements, _problem)
    tensors: dict[str, torch.Tensor] = {}
    fields: dict[str, object] = {}
    without = []
    rule = adapter.expects if component is not None else None
    for name, part in _parts(adapter, component).items():
        own, config = _part(name, part, rule)
        for module, leaves in own.items():
            tensors |= {f"{name}.{module}.{leaf}": tensor for leaf, tensor in leaves.items()}
        fields |= {f"{name}.{key}": value for key, value in (config or {}).items()}
        without += [name] if config is None else []
    if without and fields:
        raise AdapterError(
            f"{NAME} holds a config of all components or of none, and the LoKr of "
            f"{shorten(without)} has none; write the components to files of their own"
        )
    return tensors, {METADATA: json.dumps(fields, indent=2, sort_keys=True)} if fields else {}


def _problem(update: AnyUpdate) -> str | None:
    held = {dialects.BIASES, dialects.DORA, dialects.GROUPS}
    return None if _is_lokr(update) else dialects.not_lora(update, held)


def _is_lokr(update: AnyUpdate) -> bool:
    """Whether PEFT would load it as LoKr: with a config's settings, or with a scale of 1."""
    tensors, settings = update.stored_tensors, update.stored_settings
    if not update.makes_anew or not tensors:
        return False
    is_own = tensors.keys() <= LOKR and settings.get("writer") == "peft"
    return is_own and (FACTOR in settings or settings.get("scale") == 1)


def _part(
    name: str, part: Mapping[str, AnyUpdate], rule: TargetRule | None
) -> tuple[Mapping[str, Tensors], Fields | None]:
    """The tensors of one component as PEFT has them, and the fields of its config."""
    lokr = [module for module, update in part.items() if _is_lokr(update)]
    said = {FACTOR in part[module].stored_settings for module in lokr}
    if lokr and (len(lokr) < len(part) or len(said) > 1):
        raise AdapterError(f"{NAME} cannot hold LoKr beside others in one model, {name}")
    made: type[PeftConfig] = LokrConfig if lokr else LoraConfig
    own = part if lokr else {module: _of_module(update) for module, update in part.items()}
    if said == {False}:
        return made.tensors_of(own), None
    with within(name):
        config = config_of(PeftLayout(made, own, Adapter("part", own, expects=rule), {}, []))
    return made.tensors_of(own), dump(config)


def _of_module(update: AnyUpdate) -> AnyUpdate:
    """A product of two factors as LoRA of a module, whatever it came from."""
    if isinstance(update, Update) and (is_told(update.stored) or name_of(update) is not None):
        update = replace(update, stored=None)
    return as_lora(update)


def _parts(adapter: Adapter, component: str | None) -> dict[str, dict[str, AnyUpdate]]:
    """The updates of each component, their paths being those in the component's model."""
    expected = ", ".join(COMPONENTS)
    if component is not None:
        if component not in COMPONENTS:
            raise AdapterError(f"component is {component!r:.80}, expected one of {expected}")
        return {component: dict(adapter.updates)}
    groups: dict[str, dict[str, AnyUpdate]] = {}
    for module, update in adapter.updates.items():
        start, _, rest = module.partition(".")
        if start not in COMPONENTS or not rest:
            raise AdapterError(
                f"{module} begins with no component's name; pass component=, one of "
                f"{expected}, to say what the paths are of"
            )
        groups.setdefault(start, {})[rest] = update
    return groups
