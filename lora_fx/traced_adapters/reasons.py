"""What of PEFT is no change of weights, and what to do about it instead."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.errors import AdapterError

_PROMPT = "puts trained tokens, or keys and values, before the input, and changes no layer"
_ROUTER = "mixes its factors by what each input is, so that no one weight says the same"
# peft_type -> why no weight W' says what it computes.
NOT_AFFINE = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "adds gated attention to trained tokens, and changes no layer",
    "LILY": _ROUTER,
    "XLORA": _ROUTER,
    "POLY": "mixes its factors by the task that each call names, so that no one weight says it",
    "SHADOW": "runs a small network of its own beside the model, and changes no layer",
}
# Fields of LoRA's config that do the same.
NOT_AFFINE_LORA = {
    "arrow_config": "which " + _ROUTER,
    "layer_replication": "which makes another model, of more layers",
}
ADVICE = "trace and export the model that PEFT wraps (lora_fx.trace) instead"


def refuse_what_is_not_affine(name: str, fields: Mapping[str, object]) -> None:
    """Refuses types and options whose effect no weight has, with the reason.

    Raises:
        AdapterError: names the type or the field.
    """
    if name in NOT_AFFINE:
        raise AdapterError(f"peft_type is {name!r}, which {NOT_AFFINE[name]}; {ADVICE}")
    for field, why in NOT_AFFINE_LORA.items():
        if name == "LORA" and fields.get(field) not in (None, False, []):
            raise AdapterError(
                f"{field} is {fields[field]!r:.80}, a feature that is not supported, {why}; "
                f"{ADVICE}"
            )
