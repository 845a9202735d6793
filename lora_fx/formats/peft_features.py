"""Which fields of PEFT's config may be ignored, and which features must be refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from lora_fx.errors import AdapterError, AdapterWarning

# Fields that say nothing about the result: who made the adapter, from what, and how it was trained.
# fan_in_fan_out is among them because a saved one is unreliable: PEFT overwrites it with the value
# of the layer wrapped last, so in a model of Linear and Conv1D it is wrong for one of the two. The
# kind of layer that the update meets decides instead. megatron_core names a module: never imported.
_NEUTRAL = """
    auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out
    inference_mode loftq_config lora_dropout lora_ga_config megatron_config
    megatron_core peft_version qalora_group_size revision runtime_config task_type
"""
_HONOURED = """
    alpha_pattern bias exclude_modules init_lora_weights layers_pattern
    layers_to_transform lora_alpha lora_bias modules_to_save peft_type r rank_pattern
    target_modules use_rslora
"""
# Of these an empty object is not "off": PEFT makes the default sub-config of one.
_UNSUPPORTED = """
    alora_invocation_tokens arrow_config ensure_weight_tying kasa_config
    layer_replication monteclora_config target_parameters trainable_token_indices
    use_bdlora use_dora use_qalora velora_config
"""
NEUTRAL, HONOURED, UNSUPPORTED = (
    frozenset(names.split()) for names in (_NEUTRAL, _HONOURED, _UNSUPPORTED)
)
# Initial values that leave the base alone, and those that subtract something from its weights.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_features(fields: Mapping[str, object]) -> None:
    """Refuses another method than LoRA, and every feature that would change the result."""
    if "peft_type" not in fields:
        raise AdapterError("peft_type is missing, expected 'LORA'")
    if fields["peft_type"] != "LORA":
        raise AdapterError(f"peft_type is {fields['peft_type']!r}, only 'LORA' is supported")
    for name, value in fields.items():
        is_off = value is None or value is False or value == []
        if name in UNSUPPORTED and not is_off:
            raise AdapterError(f"{name} is {value!r:.80}, a feature that is not supported")
        if value and name not in UNSUPPORTED | HONOURED | NEUTRAL:
            raise AdapterError(
                f"{name} is {value!r:.80}, an unknown field that may change the result; "
                "remove it if it does not"
            )


def check_init(fields: Mapping[str, object], origin: str, strict: bool) -> None:
    """Refuses, or with ``strict=False`` warns of, an initialisation that changed the base."""
    init = fields.get("init_lora_weights")
    if init in HARMLESS_INITS:
        return
    if not isinstance(init, str) or not init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(f"init_lora_weights is {init!r:.80}, a feature that is not supported")
    message = (
        f"init_lora_weights is {init!r}: training changed the base weights too, so the adapter "
        "fits that base alone; save it with PEFT's path_initial_model_for_weight_conversion"
    )
    if strict:
        raise AdapterError(f"{message}, or pass strict=False to use it as it is")
    warnings.warn(f"{origin}: {message}", AdapterWarning, stacklevel=6)
