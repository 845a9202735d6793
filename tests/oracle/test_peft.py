"""PEFT in eager is the oracle: every architecture times every option of a LoRA config."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file

import lora_fx
from lora_fx import fold, inject, load_adapter, text, unfold
from lora_fx.layers.sites import sites
from lora_fx.numerics import TOLERANCE
from lora_fx.testing import relative, zoo
from lora_fx.testing.zoo import traced

pytestmark = [
    # PEFT says what it does about Conv1D, takes lora_bias for a broken shard, advises on ties, and
    # says what it saves and what not.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]

MODELS = ["bert", "gpt2", "llama", "mlp", "qwen2", "t5", "vit"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"<0>": 7}, "alpha_pattern": {"<1>": 3}, "use_rslora": True},
    "bias_lora_only": {"bias": "lora_only"},
    "bias_all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["<head>"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["<0>"]},
    "float16": {"file_dtype": torch.float16},
    "bfloat16": {"file_dtype": torch.bfloat16},
}


# Options of other kinds: the class of the config and its fields, in place of LoRA's.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dora": (PeftConfig, {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "dora_patterns": (
        PeftConfig,
        {"r": 4, "lora_alpha": 6, "use_dora": True, "rank_pattern": {"<0>": 7}, "use_rslora": True},
    ),
    "adalora": (AdaLoraConfig, {"init_r": 4, "target_r": 3, "lora_alpha": 6, "total_step": 10}),
    "vera": (VeraConfig, {"r": 5, "projection_prng_key": 3}),
    "vera_unsaved": (VeraConfig, {"r": 5, "save_projection": False}),
    "loha": (LoHaConfig, {"r": 3, "alpha": 4}),
    "loha_patterns": (LoHaConfig, {"r": 3, "alpha": 4, "rank_pattern": {"<0>": 2}}),
    "lokr": (LoKrConfig, {"r": 2, "alpha": 3}),
    "lokr_both": (LoKrConfig, {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    "ia3": (IA3Config, {"feedforward_modules": ["<1>"]}),
    "oft": (OFTConfig, {"r": 0, "oft_block_size": 2}),
    "oft_exact": (OFTConfig, {"r": 0, "oft_block_size": 2, "use_cayley_neumann": False}),
    "embedding": (PeftConfig, {"r": 4, "lora_alpha": 6, "and": "<table>"}),
    "embedding_dora": (PeftConfig, {"r": 4, "lora_alpha": 6, "and": "<table>", "use_dora": True}),
    "tokens": (PeftConfig, {"r": 4, "lora_alpha": 6, "trainable_token_indices": [1, 5, 9]}),
}
TABLES = ("word_embeddings", "wte", "embed_tokens", "shared")


def filled(value: Any, case: Any) -> Any:
    """Puts a case's own module names where an option says ``<0>``, ``<1>``, ``<head>``."""
    table = next(
        (t for t in TABLES if any(p.endswith(f"{t}.weight") for p in case.model.state_dict())), ""
    )
    names = {"<0>": case.targets[0], "<1>": case.targets[1], "<head>": case.head, "<table>": table}
    if value == "<table>":
        return table
    if isinstance(value, dict):
        return {names.get(k, k): v for k, v in value.items()}
    return [names.get(v, v) for v in value] if isinstance(value, list) else value


def options_for(case: Any, option: str) -> dict[str, Any]:
    lora = {"r": 4, "lora_alpha": 6, **OPTIONS.get(option, {})}
    given = KINDS[option][1] if option in KINDS else lora
    fields = {key: filled(value, case) for key, value in given.items()}
    if isinstance(fields.get("feedforward_modules"), list):
        fields["feedforward_modules"] = [
            t for t in case.targets if t in fields["feedforward_modules"]
        ]
    return fields


# How far from zero each kind of tensor is drawn, for an effect that is plain and does not saturate.
SPREAD = {
    "lora_E": 1.0,
    "lora_": 0.15,
    "hada_": 0.4,
    "lokr_": 0.3,
    "oft_R": 0.4,
    "vera_lambda": 0.7,
}


def randomised(model: PeftModel) -> None:
    """Values as if trained, every tensor with an effect."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("magnitude" in name or "ia3" in name):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.requires_grad:
                spread = next((s for part, s in SPREAD.items() if part in name), 1.0)
                parameter.normal_(0.0, spread)


def saved_by_peft(case: Any, option: str, path: Path) -> PeftModel:
    """Trains (randomises) a PEFT model, saves it, and loads it again from its file."""
    fields = options_for(case, option)
    dtype = fields.pop("file_dtype", torch.float32)
    targets = case.targets
    if "modules_to_save" in fields:
        targets = [t for t in targets if t not in fields["modules_to_save"]]
    if "and" in fields:
        targets = [*targets, fields.pop("and")]
    kind = KINDS[option][0] if option in KINDS else PeftConfig
    config = kind(target_modules=targets, **fields)
    model = get_peft_model(copy.deepcopy(case.model), config)
    randomised(model)
    model.save_pretrained(path)
    file = path / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return PeftModel.from_pretrained(copy.deepcopy(case.model), path).eval()


def applies(model: str, option: str) -> bool:
    """Whether the architecture has what the option is about."""
    no_bias = option in ("bias_lora_only", "bias_all", "lora_bias") and model in ("t5", "qwen2")
    # PEFT's pattern wants a segment before "layers.1", which a bare ViTModel has not.
    no_layers = option == "layers_to_transform" and model in ("mlp", "vit")
    # PEFT refuses to add a bias to a layer without one.
    mixed_bias = option == "lora_bias" and model in ("mlp", "llama")
    no_table = option in ("embedding", "embedding_dora", "tokens") and model in ("mlp", "vit")
    # PEFT has these kinds for torch's own linear layers alone.
    no_conv1d = option.startswith(("loha", "lokr", "oft")) and model == "gpt2"
    no_blocks = option.startswith("oft") and model == "mlp"  # of 3, 5 and 7
    return not (no_bias or no_layers or mixed_bias or no_table or no_conv1d or no_blocks)


CASES = [(m, o) for m in MODELS for o in (*OPTIONS, *KINDS) if applies(m, o)]


@functools.cache
def of_base(model: str) -> Any:
    """What a base's graph computes: only read."""
    case, gm = traced(model)
    with torch.no_grad():
        return gm(**case.others)


@pytest.mark.parametrize(("model", "option"), CASES)
def test_inject_and_fold_equal_peft(model: str, option: str, tmp_path: Path) -> None:
    case, gm = traced(model)
    peft = saved_by_peft(case, option, tmp_path / "french")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    adapter = load_adapter(tmp_path / "french", base=case.model)
    injected = inject(gm, adapter)
    folded = fold(injected)
    with torch.no_grad():
        wanted = peft(**case.others)
        assert relative(injected(**case.others), wanted) <= 1e-6
        assert relative(folded(**case.others), wanted) <= 1e-5
        assert relative(of_base(model), wanted) > 1e-2
    assert text(unfold(folded)) == text(injected)
    after = case.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_half_precision_folds_within_the_table(
    model: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case, _ = traced(model)
    saved_by_peft(case, "plain", tmp_path / "french")
    half = copy.deepcopy(case.model).to(dtype)
    gm = lora_fx.trace(half, (), case.others)  # a sixth of the time that free axes take
    injected = inject(gm, load_adapter(tmp_path / "french"))
    folded = fold(injected)
    assert {site.dtype for site in sites(folded)} == {dtype}
    wide = copy.deepcopy(half).float()
    exact = PeftModel.from_pretrained(wide, tmp_path / "french").eval()
    with torch.no_grad():
        wanted = exact(**case.others)
        assert relative(folded(**case.others), wanted) <= TOLERANCE[dtype]
        assert relative(injected(**case.others), wanted) <= TOLERANCE[dtype]
        assert relative(gm(**case.others), wanted) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("model", ["qwen2", "gpt2", "llama"])
def test_an_adapted_head_that_peft_stores_whole_as_well(model: str, tmp_path: Path) -> None:
    case, gm = traced(model)
    config = PeftConfig(r=4, lora_alpha=6, target_modules=[*case.targets, "lm_head"])
    peft = get_peft_model(copy.deepcopy(case.model), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert list(adapter.replacements) == ["lm_head.weight"]
    injected = inject(gm, adapter)
    with torch.no_grad():
        wanted = peft(**case.others)
        assert relative(injected(**case.others), wanted) <= 1e-6
        assert relative(fold(injected)(**case.others), wanted) <= 1e-5
        assert relative(gm(**case.others), wanted) > 1e-2
    lora_fx.save_adapter(adapter, tmp_path / "b")
    again = load_adapter(tmp_path / "b")
    assert torch.equal(again.replacements["lm_head.weight"], adapter.replacements["lm_head.weight"])
    assert again.updates.keys() == adapter.updates.keys()
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(injected, path, adapters="input", verify=False)
    lora_fx.export_adapter(adapter, path, tmp_path / "a.onnx_adapter")
    other = lora_fx.Adapter("a", adapter.updates, {"lm_head.weight": torch.ones(97, 24)})
    with pytest.raises(lora_fx.AdapterError, match=r"no slot at lm_head\.weight"):
        lora_fx.export_adapter(other, path, tmp_path / "b.onnx_adapter")


@pytest.mark.parametrize(("model", "frontend"), [("mlp", "symbolic"), ("bert", "export")])
def test_an_adapter_trained_here_loads_into_peft(model: str, frontend: str, tmp_path: Path) -> None:
    case, gm = zoo(model)  # of torch.export
    base = gm if frontend == "export" else lora_fx.trace(case.model, frontend=frontend)
    config = lora_fx.LoraConfig(
        r=4, alpha=6, dropout=0.3, target_modules=case.targets, use_rslora=True, seed=0
    )
    gm = inject(base, config).train()
    parameters = [p for p in gm.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    torch.manual_seed(0)
    for _ in range(5):
        optimizer.zero_grad()
        sum(
            t.square().mean() for t in torch.utils._pytree.tree_leaves(gm(**case.inputs))
        ).backward()
        optimizer.step()
    gm.eval()
    lora_fx.save_adapter(lora_fx.adapter_from(gm), tmp_path / "trained")
    peft = PeftModel.from_pretrained(copy.deepcopy(case.model), tmp_path / "trained").eval()
    with torch.no_grad():
        wanted = peft(**case.others)
        assert relative(gm(**case.others), wanted) <= 1e-6
        assert relative(fold(gm)(**case.others), wanted) <= 1e-5
        assert relative(case.model(**case.others), wanted) > 1e-2
