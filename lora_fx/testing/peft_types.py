"""Adapters of the types of PEFT that are read through PEFT itself, with the options of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lora_fx.testing.models import Two
from lora_fx.testing.models import even_linear as _even
from lora_fx.testing.models import table_and_linear as _embedding
from lora_fx.testing.models import two_linear as _linear
from lora_fx.testing.models import two_transposed as _transposed

Make = Callable[[], Any]
_BOTH = ["wide", "narrow"]


def _even_transposed() -> nn.Module:
    from transformers import pytorch_utils

    make: Any = pytorch_utils.Conv1D
    return Two(make(12, 8), make(4, 12))


def _conv(kind: Any, **options: Any) -> Make:
    fields = {"kernel_size": 3, "stride": 2, "padding": 1} | options
    return lambda: Two(kind(4, 6, **fields), kind(6, 8, 1, bias=False))


def _normed() -> nn.Module:
    return Two(nn.LayerNorm(3), nn.Linear(3, 7))


def _config(name: str, options: dict[str, Any]) -> Any:
    import peft

    return getattr(peft, name)(**{"target_modules": _BOTH, **options})


def _lora(kind: str = "", **fields: Any) -> Any:
    """LoRA with an option whose config is a class of its own."""
    import peft.tuners.lora.config as configs

    made = (
        {field: getattr(configs, kind)(**value) for field, value in fields.items()}
        if kind
        else fields
    )
    return _config("LoraConfig", {"r": 2, "lora_alpha": 3, **made})


_OF = {
    "adamss": "AdamssConfig", "beft": "BeftConfig", "boft": "BOFTConfig", "c3a": "C3AConfig",
    "deft": "DeftConfig", "delora": "DeloraConfig", "fourierft": "FourierFTConfig",
    "frod": "FrodConfig", "glora": "GloraConfig", "gralora": "GraloraConfig", "hira": "HiraConfig",
    "hra": "HRAConfig", "ln_tuning": "LNTuningConfig", "miss": "MissConfig", "osf": "OSFConfig",
    "peanut": "PeanutConfig", "psoft": "PsoftConfig", "pvera": "PveraConfig",
    "randlora": "RandLoraConfig", "road": "RoadConfig", "shira": "ShiraConfig",
    "supertuning": "SupertuningConfig", "tinylora": "TinyLoraConfig", "unilora": "UniLoraConfig",
    "vblora": "VBLoRAConfig", "waveft": "WaveFTConfig",
}  # fmt: skip
_VB = {"r": 2, "num_vectors": 6, "vector_length": 2}
_FREQUENT = {"n_frequency": 9, "scaling": 9.0}
_SPARSE = {"progressbar": False, "sparse_rate": 0.2}
_ADA = {"r": 4, "num_subspaces": 2, "subspace_rank": 1}
# Each: the model, the type and its options.
_CASES: list[tuple[str, Make, str, dict[str, Any]]] = [
    ("linear", _even, "adamss", _ADA),
    ("linear dynamic", _even, "adamss", _ADA | {"use_dynamic_rank": True}),
    ("ragged", _linear, "adamss", {"r": 3, "num_subspaces": 2, "subspace_rank": 1}),
    ("ragged", _linear, "beft", {}),
    ("linear", _even, "boft", {"boft_block_size": 4}),
    ("linear butterfly", _even, "boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    ("linear blocks", _even, "boft", {"boft_block_num": 2, "boft_block_size": 0}),
    ("linear biases", _even, "boft", {"boft_block_size": 4, "bias": "boft_only"}),
    ("conv2d", _conv(nn.Conv2d), "boft", {"boft_block_size": 2, "target_modules": ["wide"]}),
    ("linear", _even, "c3a", {"block_size": 4}),
    ("linear pattern", _even, "c3a", {"block_size": 4, "block_size_pattern": {"wide": 2}}),
    ("ragged", _linear, "deft", {"r": 2}),
    ("ragged qr", _linear, "deft", {"r": 2, "decomposition_method": "qr"}),
    ("ragged para", _linear, "deft", {"r": 2, "para": True}),
    ("Conv1D", _transposed, "deft", {"r": 2, "fan_in_fan_out": True}),
    ("ragged", _linear, "delora", {"r": 2}),
    ("ragged patterns", _linear, "delora",
     {"r": 2, "rank_pattern": {"wide": 3}, "lambda_pattern": {"narrow": 5}}),
    ("ragged", _linear, "fourierft", _FREQUENT),
    ("ragged seed", _linear, "fourierft", _FREQUENT | {"random_loc_seed": 5}),
    ("ragged pattern", _linear, "fourierft", _FREQUENT | {"n_frequency_pattern": {"wide": 4}}),
    ("Conv1D", _transposed, "fourierft", _FREQUENT | {"fan_in_fan_out": True}),
    ("ragged", _linear, "frod", _SPARSE),
    ("ragged unsaved", _linear, "frod", _SPARSE | {"save_projection": False}),
    ("Conv1D", _transposed, "frod", _SPARSE | {"fan_in_fan_out": True}),
    ("ragged", _linear, "glora", {"r": 2}),
    ("ragged vectors", _linear, "glora",
     {"r": 2, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("ragged constants", _linear, "glora",
     {"r": 2, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    ("linear", _even, "gralora", {"r": 4, "gralora_k": 2}),
    ("linear hybrid", _even, "gralora", {"r": 4, "gralora_k": 2, "hybrid_r": 2}),
    ("Conv1D", _even_transposed, "gralora", {"r": 4, "gralora_k": 2, "fan_in_fan_out": True}),
    ("ragged", _linear, "hira", {"r": 2}),
    ("ragged pattern", _linear, "hira", {"r": 2, "rank_pattern": {"wide": 1}}),
    ("Conv1D", _transposed, "hira", {"r": 2, "fan_in_fan_out": True}),
    ("embedding", _embedding, "hira", {"r": 2}),
    ("conv1d", _conv(nn.Conv1d), "hira", {"r": 2}),
    ("conv2d", _conv(nn.Conv2d), "hira", {"r": 2}),
    ("conv3d", _conv(nn.Conv3d), "hira", {"r": 2, "target_modules": ["wide"]}),
    ("ragged", _linear, "hra", {"r": 2}),
    ("ragged orthogonal", _linear, "hra", {"r": 2, "apply_GS": True}),
    ("linear long", _even, "hra", {"r": 20}),
    ("conv2d", _conv(nn.Conv2d), "hra", {"r": 2}),
    ("conv2d orthogonal", _conv(nn.Conv2d), "hra", {"r": 2, "apply_GS": True}),
    ("norm", _normed, "ln_tuning", {"target_modules": ["wide"]}),
    ("linear", _even, "miss", {"r": 2}),
    ("ragged", _linear, "miss", {"r": 2}),
    ("linear bat", _even, "miss", {"r": 2, "init_weights": "bat"}),
    ("linear mini", _even, "miss", {"r": 2, "mini_r": 2, "init_weights": "mini"}),
    ("ragged", _linear, "osf", {}),
    ("ragged rank", _linear, "osf", {"effective_rank": 2, "rank_pattern": {"wide": 1}}),
    ("ragged", _linear, "peanut", {"r": 2}),
    ("ragged deep", _linear, "peanut", {"r": 2, "depth": 2, "act_fn": "tanh"}),
    ("ragged", _linear, "psoft", {"r": 2}),
    ("ragged plain", _linear, "psoft",
     {"r": 2, "psoft_mag_a": False, "psoft_mag_b": False, "ab_svd_init": "pissa_init"}),
    ("ragged solved", _linear, "psoft", {"r": 2, "use_cayley_neumann": True}),
    ("ragged bounded", _linear, "psoft",
     {"r": 2, "use_cayley_neumann": True, "cayley_neumann_eps": 1e-3}),
    ("ragged", _linear, "pvera", {"r": 2}),
    ("ragged unsaved", _linear, "pvera", {"r": 2, "save_projection": False}),
    ("Conv1D", _transposed, "pvera", {"r": 2, "fan_in_fan_out": True}),
    ("ragged", _linear, "randlora", {"r": 2, "randlora_alpha": 3}),
    ("ragged sparse", _linear, "randlora", {"r": 2, "randlora_alpha": 3, "sparse": True}),
    ("ragged unsaved", _linear, "randlora",
     {"r": 2, "randlora_alpha": 3, "very_sparse": True, "save_projection": False}),
    ("Conv1D", _transposed, "randlora", {"r": 2, "randlora_alpha": 3, "fan_in_fan_out": True}),
    ("linear", _even, "road", {"group_size": 2}),
    ("linear groups", _even, "road", {"group_size": 4, "variant": "road_2"}),
    ("linear four", _even, "road", {"group_size": 2, "variant": "road_4"}),
    ("ragged", _linear, "shira", {"r": 1}),
    ("ragged seed", _linear, "shira", {"r": 1, "random_seed": 5}),
    ("ragged", _linear, "supertuning", {"sparsity": 0.5}),
    ("ragged bottom", _linear, "supertuning", {"sparsity": 0.5, "select_top": False}),
    ("ragged lora", _linear, "supertuning", {"sparsity": 0.5, "r": 2, "lora_alpha": 3}),
    ("ragged", _linear, "tinylora", {"r": 2, "u": 3}),
    ("ragged tied", _linear, "tinylora", {"r": 2, "u": 3, "weight_tying": 1.0}),
    ("ragged unsaved", _linear, "tinylora", {"r": 2, "u": 3, "save_projection": False}),
    ("Conv1D", _transposed, "tinylora", {"r": 2, "u": 3, "fan_in_fan_out": True}),
    ("embedding", _embedding, "tinylora", {"r": 2, "u": 3}),
    ("ragged", _linear, "unilora", {"r": 2, "theta_d_length": 16}),
    ("ragged indices", _linear, "unilora",
     {"r": 2, "theta_d_length": 16, "save_indices": True}),
    ("Conv1D", _transposed, "unilora",
     {"r": 2, "theta_d_length": 16, "fan_in_fan_out": True}),
    ("linear", _even, "vblora", _VB),
    ("linear topk", _even, "vblora", _VB | {"save_only_topk_weights": True, "topk": 3}),
    ("Conv1D", _even_transposed, "vblora", _VB | {"fan_in_fan_out": True}),
    ("ragged", _linear, "waveft", _FREQUENT),
    ("ragged family", _linear, "waveft", _FREQUENT | {"wavelet_family": "db2"}),
    ("ragged spectrum", _linear, "waveft", _FREQUENT | {"use_idwt": False}),
    ("ragged proportional", _linear, "waveft", _FREQUENT | {"proportional_parameters": True}),
    ("Conv1D", _transposed, "waveft", _FREQUENT | {"fan_in_fan_out": True}),
]  # fmt: skip
PEFT_TYPES: dict[str, tuple[Make, Make]] = {
    f"{kind}, {name}": (base, partial(_config, _OF[kind], options))
    for name, base, kind, options in _CASES
}
_LORA_OPTIONS: dict[str, tuple[Make, Make]] = {
    "lora, qalora": (_even, lambda: _lora(use_qalora=True, qalora_group_size=2)),
    "lora, kasa": (_linear, lambda: _lora("KasaConfig", kasa_config={})),
    "lora, monteclora": (_linear, lambda: _lora("MontecloraConfig", monteclora_config={})),
    "lora, velora": (_even, lambda: _lora("VeloraConfig", velora_config={"num_groups": 4})),
    "lora, bdlora": (
        _even,
        lambda: _lora(
            "BdLoraConfig",
            use_bdlora={
                "target_modules_bd_a": ["wide"],
                "target_modules_bd_b": ["narrow"],
                "nblocks": 2,
            },
        ),
    ),
}
PEFT_TYPES |= _LORA_OPTIONS
# Types whose effect no weight has.
NOT_WEIGHTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
    *("ADAPTION_PROMPT", "LILY", "XLORA", "POLY", "SHADOW"),
)
