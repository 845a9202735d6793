"""PEFT's types of adapters: what each stores, one record of options and one line of a table each.

To read and write another type whose kind is in ``KINDS``, add its options and a line.
"""

from __future__ import annotations

from lora_fx.formats.peft_records import (
    Ia3Options,
    LohaOptions,
    LokrOptions,
    OftOptions,
    TokenOptions,
    VeraOptions,
)
from lora_fx.formats.peft_settings import adalora, feedforward, options_alone, scaled, tokens
from lora_fx.formats.peft_type import PeftType


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS = _words("layers_to_transform layers_pattern")
# How it was trained. fan_in_fan_out is among them because a saved one is unreliable: PEFT
# overwrites it with the value of the layer wrapped last, so in a model of Linear and Conv1D it is
# wrong for one of the two. The layer that the update meets decides. megatron_core names a module:
# never imported.
_LORA_NEUTRAL = _words(
    """corda_config eva_config fan_in_fan_out loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core qalora_group_size runtime_config"""
)
# Of these an empty object is not "off": PEFT makes the default sub-config of one.
_LORA_UNSUPPORTED = _words(
    """alora_invocation_tokens arrow_config kasa_config layer_replication monteclora_config
    use_bdlora use_qalora velora_config"""
)
# AdaLoRA's layers never look at these, whatever the config says.
_ADALORA_NEUTRAL = _LORA_NEUTRAL | _words(
    """r use_rslora alpha_pattern lora_bias init_lora_weights target_r tinit tfinal deltaT beta1
    beta2 orth_reg_weight total_step"""
)
_TIED = _words("trainable_token_indices ensure_weight_tying")
_LORA_OWN = _words("use_rslora use_dora lora_bias target_parameters init_lora_weights")
_LYCORIS_NEUTRAL = _words("rank_dropout module_dropout init_weights")
_LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"
_LOKR = "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"
_LORA = "lora_A.weight lora_B.weight lora_B.bias lora_embedding_A lora_embedding_B"

LORA = PeftType(
    "LORA", "lora", (*_LORA.split(), "lora_magnitude_vector"), options_alone,
    rank=("r", 8), alpha="lora_alpha", ranked=("lora_A.weight", "lora_embedding_A"),
    biases=("none", "lora_only", "all"), neutral=_LORA_NEUTRAL, unsupported=_LORA_UNSUPPORTED,
    own=_LORA_OWN | _TIED,
)  # fmt: skip
TYPES: dict[str, PeftType] = {
    kind.name: kind
    for kind in (
        LORA,
        PeftType(
            "ADALORA", "adalora", ("lora_A", "lora_B", "lora_E"), adalora,
            rank=("init_r", 12), alpha="lora_alpha", ranked=("lora_A",),
            biases=("none", "lora_only", "all"), neutral=_ADALORA_NEUTRAL,
            unsupported=_LORA_UNSUPPORTED | {"use_dora", "target_parameters"}, own=_TIED,
        ),
        PeftType(
            "LOHA", "loha", tuple(_LOHA.split()), scaled, LohaOptions, ("r", 8), "alpha",
            ("hada_w1_b", "hada_w2_b"), neutral=_LYCORIS_NEUTRAL,
        ),
        PeftType(
            "LOKR", "lokr", tuple(_LOKR.split()), scaled, LokrOptions, ("r", 8), "alpha",
            ("lokr_w1_b", "lokr_w2_b"), neutral=_LYCORIS_NEUTRAL | {"rank_dropout_scale"},
        ),
        PeftType(
            "VERA", "vera", ("vera_lambda_b", "vera_lambda_d"), options_alone, VeraOptions,
            ("r", 256), ranked=("vera_lambda_d",), biases=("none", "vera_only", "all"),
            neutral=_words("vera_dropout d_initial fan_in_fan_out init_weights"), targets=LAYERS,
        ),
        PeftType(
            "IA3", "ia3", ("ia3_l",), feedforward, Ia3Options,
            neutral=_words("fan_in_fan_out init_ia3_weights"),
            targets=frozenset({"exclude_modules"}),
        ),
        PeftType(
            "OFT", "oft", ("oft_R.weight", "oft_embedding_R.weight"), options_alone, OftOptions,
            biases=("none", "oft_only", "all"),
            neutral=_words("module_dropout fan_in_fan_out init_weights"),
        ),
        PeftType(
            "TRAINABLE_TOKENS", "tokens", ("trainable_tokens_delta",), tokens, TokenOptions,
            neutral=_words("init_weights"), targets=frozenset(),
        ),
    )
}  # fmt: skip
