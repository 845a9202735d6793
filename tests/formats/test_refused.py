"""Files that no reader takes, and what is said of each: a sound pair, and what is done to it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter
from lora_fx.formats.loralib import ALPHAS
from lora_fx.formats.peft import METADATA

# A tensor of ones is told by its shape; metadata is a text, or the object that it says.
Stored = dict[str, tuple[int, ...] | torch.Tensor]
Row = tuple[Stored, Any, dict[str, Any], str]
BASE = nn.ModuleDict(
    {
        "fc": nn.Linear(3, 5), "norm": nn.LayerNorm(5), "turned": nn.ConvTranspose2d(3, 5, 1),
        "emb": nn.Embedding(11, 3), "head": nn.Linear(5, 7),
        "conv": nn.Conv2d(6, 4, 3), "less": nn.Conv2d(5, 4, 3), "tall": nn.Conv2d(6, 4, (3, 1)),
        "line": nn.Conv1d(6, 4, 3),
    }
)  # fmt: skip
DOWN, UP = (2, 3), (5, 2)


def kohya(layer: str, down: tuple[int, ...] = DOWN, up: tuple[int, ...] = UP) -> Stored:
    return {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}


def pair(layer: str, ending: str = "", down: Any = DOWN, up: Any = UP) -> Stored:
    return {f"{layer}.lora_A{ending}": down, f"{layer}.lora_B{ending}": up}


def peft(layer: str) -> Stored:
    return pair(layer, ".weight")


LORA, START, FC = kohya("lora_unet_fc"), "lora_unet_fc", pair("fc")
TWO = nn.ModuleDict(
    {"a": nn.ModuleDict({"b_c": nn.Linear(3, 5)}), "a_b": nn.ModuleDict({"c": nn.Linear(3, 5)})}
)
KOHYA: list[Row] = [
    (LORA, None, {"base": None}, "names lose the dots of a path; pass base="),
    (LORA, None, {"component": "te"}, "nothing is adapted"),
    *[
        (LORA, None, {"component": part}, f"component is {part!r}, expected one of unet, te, te1, ")
        for part in ("vae", "lora_unet", "", 3)
    ],
    (kohya("lora_unet_a_b_c"), None, {"base": TWO}, r"lora_unet_a_b_c \(a\.b_c or a_b\.c\)"),
    *[
        ({**LORA, f"{START}.{leaf}": (5,)}, None, {}, f"'{START}.{leaf}' is {feature}")
        for leaf, feature in {
            "lambda_layer": "T-LoRA", "scalar": "a scaled update", "boft_R": "BOFT",
        }.items()
    ],
    ({"lycoris_fc.oft_blocks": (2, 5, 2, 2)}, None, {},
     r"oft_blocks is \(2, 5, 2, 2\), which is no BOFT of a layer"),
    ({**LORA, "lora_unet_x.alpha": ()}, None, {}, r"half of a pair.*x\.alpha"),
    ({**LORA, f"{START}.alpha": (2,)}, None, {}, r"alpha' is \(2,\), expected one"),
    (kohya(START, (2, 3, 3, 3)), None, {},
     r"a\.safe.*: lora_unet_fc: made for a layer \(5, 3, 3, 3\), the Linear is \(5, 3\)"),
    ({**LORA, f"{START}.hada_w1_a": UP}, None, {},
     "'hada_w1_a', 'lora_down.weight', 'lora_up.weight'. are of no single algorithm"),
    ({**LORA, f"{START}.lora_mid.weight": (2, 2)}, None, {},
     r"lora_mid.weight is \(2, 2\), expected \(r, r, k, \*kernel\)"),
    ({**LORA, f"{START}.dora_scale": (1, 4)}, None, {},
     r"dora_scale is \(1, 4\), expected \(out, 1, ...\)"),
    ({f"{START}.w_norm": (5,)}, None, {}, "lora_unet_fc: .'w_norm'. do not fit fc, a Linear"),
    (kohya("lora_unet_proj"), None, {},
     "1 names mean no layer of the base: lora_unet_proj; its layers: fc"),
    (kohya("lora_unet_norm"), None, {}, "lora_unet_norm: .*do not fit norm, a LayerNorm"),
    (kohya("lora_unet_turned", (2, 3, 1, 1), (5, 2, 1, 1)), None, {},
     "is of turned, a ConvTranspose2d; linear, embedding"),
    ({**LORA, "bundle_emb.x.string_to_param": (3,)}, None, {},
     "1 tensors have names of no known use: bundle_emb"),
    ({**LORA, "lycoris_fc.lora_up.weight": (5, 1)}, None, {},
     "fc and lycoris_fc are both of fc; pass component='lycoris'"),
    ({**LORA, f"{START}.lora_down.bias": (2,)}, None, {},
     rf"no known use: {START}\.lora_down\.bias; expected lora_unet_ or "),
]  # fmt: skip
ALONE: dict[str, Any] = {"alpha": 3, "base": None}
WEIGHT: Stored = {"fc.weight": (5, 3)}
LORALIB: list[Row] = [
    (FC, None, {}, "loralib stores no alpha, so the scale is unknown; pass alpha="),
    (FC, None, {"alpha": True}, "alpha is True, expected a finite number"),
    (FC, None, {"alpha": {"fc": "3"}}, r"alpha\['fc'\] is '3'"),
    (FC, None, {"alpha": {"cf": 3}}, "alpha names what is no layer .*: cf"),
    (FC | pair("up"), None, {"alpha": {"fc": 3}, "base": None},
     "up: no alpha is given for this layer"),
    (FC, None, {"alpha": 3, "enable_lora": {"qkv": [True, False]}},
     "enable_lora names what is no layer .*: qkv"),
    (FC, None, {"alpha": 3, "r": 1}, "of rank 2, the hint r is 1; a convolution"),
    (FC, None, {"alpha": 3, "r": 2.0}, "r is 2.0, expected a positive integer"),
    (FC, {ALPHAS: {"fc": 3}}, {"alpha": 3}, "says what alpha is; leave the hint alpha out"),
    (pair("norm"), None, {"alpha": 3}, "norm is of a LayerNorm; linear, embedding and conv"),
    (pair("turned"), None, {"alpha": 3}, "turned is of a ConvTranspose2d; linear, embedding"),
    (pair("conv", "", (6, 18), (12, 6)), None, {"alpha": 3, "r": 6},
     r"\(12, 6\): of rank 2, the hint r is 6"),
    (pair("conv", "", (4, 18), (12, 4)), None, {"alpha": 3}, "expected r . 3"),
    *[
        (pair(layer, "", (6, 18), (12, 6)), None, {"alpha": 3}, f"no pair of a convolution {shape}")
        for layer, shape in {
            "less": r"\(4, 5, 3, 3\)", "tall": r"\(4, 6, 3, 1\)", "line": r"\(4, 6, 3\)",
        }.items()
    ],
    (FC | {"head.weight": (5,)}, None, ALONE, r"no known use: head\.weight; .*the whole model"),
    (FC | {"fc.lora_alpha": (1,)}, None, ALONE, r"no known use: fc\.lora_alpha"),
    (FC | WEIGHT | {"fc.lora_alpha": (1,)}, None, ALONE, r"no known use: fc\.lora_alpha"),
    (FC | {"up.lora_A": DOWN}, None, ALONE, r"half of a pair.*up\.lora_A"),
    (FC | WEIGHT | pair("up"), None, ALONE, r"1 tensors have names of no known use: fc\.weight"),
]  # fmt: skip
UNET, CONFIG = peft("unet.fc"), {"unet.r": 2, "unet.lora_alpha": 3}
TWICE, ALPHA = UNET | peft("unet.up"), {"unet.fc.alpha": torch.tensor(3.0)}
MAGNITUDE: Stored = {"unet.fc.lora_magnitude_vector": (5,)}
LOKR: Stored = {"unet.fc.lokr_w1": (2, 2)}
DIFFUSERS: list[Row] = [
    (UNET | peft("text_encoder.fc"), None, {"component": "vae"},
     "component is 'vae', the file has text_encoder, unet"),
    (TWICE | ALPHA, None, {}, r"fc has \.alpha, up has none"),
    (UNET | ALPHA, CONFIG, {}, r"\.alpha for fc, and a config in"),
    (UNET, {"transformer.r": 2}, {}, "has no field of unet"),
    (UNET, {"unet.r": 2}, {}, "of unet: lora_alpha is missing"),
    (UNET, {**CONFIG, "unet.r": 4}, {}, rf"fc: .*lora_A.weight \(2, .\) .* rank 4 by {METADATA}"),
    (UNET, {**CONFIG, "unet.use_dora": True}, {}, "use_dora is True in .* lacks"),
    (UNET, {**CONFIG, "unet.peft_type": "LOHA"}, {}, "peft_type is 'LOHA'"),
    (TWICE | MAGNITUDE, None, {}, "fc has a magnitude, up has none"),
    (TWICE | {"unet.up.lora_B.bias": (5,)}, None, {},
     "up has a bias of its up-projection, fc has none"),
    (UNET | MAGNITUDE, CONFIG, {}, "use_dora is False in .*, the file has magnitudes"),
    (UNET | {"unet.fc.lora_magnitude_vector": (3,)}, None, {},
     r"lora_magnitude_vector is \(3,\), expected \(5,\)"),
    (UNET | {"unet.up.lokr_w1": (2, 2)}, None, {}, "up is LoKr, other layers of unet are LoRA"),
    (UNET | LOKR, None, {}, r"'unet\.fc\.lora_A\.weight' stands beside LoKr's tensors"),
    (LOKR | {"unet.fc.lokr_w2": DOWN}, {**CONFIG, "unet.peft_type": "LORA"}, {},
     "peft_type is 'LORA'"),
    *[
        (UNET | {key: (1,)}, None, {}, f"1 tensors have names of no known use: {key}; exp")
        for key in (
            "fc.lora_A.weight", "vae.fc.lora_A.weight", "unet.lora_A", "unet.fc.weight",
            "unet.fc.lora_A.bias", "unet.attn.to_x_lora.down.weight", "unet",
        )
    ],
    (UNET | {"": (1,)}, None, {}, "tensor '': the name is empty"),
    ({"unet.attn.to_q.lora_A.weight": DOWN, "unet.attn.processor.to_q_lora.down.weight": DOWN},
     None, {}, r"are both the down of attn\.to_q"),
]  # fmt: skip
PEFT, HEAD = peft("base_model.model.fc"), "base_model.model.classifier"
PEFT_FILE: list[Row] = [
    (PEFT, None, {}, "holds no config, so the scale is unknown; pass alpha="),
    (PEFT, None, {"r": 2}, "holds no config, so the scale is unknown; pass alpha="),
    (PEFT, None, {"alpha": "3"}, "alpha is '3', expected a finite number"),
    (PEFT, None, {"alpha": {"fc": 3}}, "alpha is .*, expected a finite number"),
    (PEFT, None, {"alpha": 3, "r": 0}, "r is 0, expected a positive integer"),
    (PEFT, None, {"alpha": 3, "r": 4}, r"fc: lora_A.weight \(2, .\) .* of rank 4"),
    (PEFT | {f"{HEAD}.bias": (2,), f"{HEAD}.weight": (2, 5)}, None, {"alpha": 3},
     r"2 tensors .* no known use: .*classifier\.bias"),
    *[
        (PEFT, {METADATA: text}, {}, rf"a\.safetensors: {METADATA}: .*{message}")
        for text, message in {
            "": "empty, expected a JSON object",
            "[]": "holds a list",
            '{"peft_type": "LORA"}': "lora_alpha is missing",
            '{"peft_type": "LORA", "lora_alpha": 3, "use_qalora": true}': "use_qalora is True",
            '{"peft_type": "LOHA", "lora_alpha": 3}': "lora_alpha is 3, an unknown field",
            '{"peft_type": "HRA", "r": 3}': "peft_type is 'HRA'",
        }.items()
    ],
]  # fmt: skip
FC_MLX, DORA = {"fc.lora_a": (3, 2), "fc.lora_b": (2, 5)}, {"fine_tune_type": "dora"}
TABLE: Stored = {"emb.lora_a": (11, 2), "emb.lora_b": (2, 3), "emb.m": (11,)}
MLX_FIELDS = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
MLX: list[Row] = [
    (FC_MLX, {"fine_tune_type": "dpo"}, {}, "fine_tune_type is 'dpo', expected lora, dora or"),
    *[
        (FC_MLX, {"lora_parameters": parameters}, {}, message)
        for parameters, message in (
            (None, "lora_parameters is None, expected an obj"),
            ({"rank": 2}, "scale is None, expected a finite number"),
            ({"scale": 2}, "rank is None"),
            ({"rank": 2, "alpha": 16, "scale": 10},
             "alpha is 16, by which the first versions .* remove alpha"),
            ({"rank": 3, "scale": 2}, r"fc\.lora_a \(3, 2\) .* rank 3 by lora_parameters"),
        )
    ],
    (FC_MLX | {"fc.lora_c": (3, 2)}, {}, {},
     r"no known use: fc\.lora_c; expected <module>\.lora_a"),
    (FC_MLX | {"head.lora_a": (3, 2)}, {}, {}, r"half of a pair.*head\.lora_a"),
    (FC_MLX | {"fc.m": (5,), "head.m": (5,)}, DORA, {}, r"half of a pair.*head\.m"),
    (FC_MLX | {"moe.lora_a": (2, 2, 3), "moe.lora_b": (3, 5, 2)}, {}, {},
     r"moe: up is \(3, 5, 2\), expected \(experts, out, r\) with experts = 2 and r = 2"),
    (FC_MLX | {"fc.m": (5,)}, {}, {}, r"fc: .* \.m is there"),
    (FC_MLX, DORA, {}, r"fc: .* \.m is missing"),
    (FC_MLX | TABLE | {"fc.m": (5,), "emb.m": (3,)}, DORA, {},
     r"emb: emb.m is \(3,\), expected \(11,\)"),
    ({"c.weight": (2, 3, 3)}, {"fine_tune_type": "full"}, {}, "c.weight: of more"),
    ({}, {}, {}, "no pair of down and up in it, so nothing is adapted"),
]  # fmt: skip
FC_TUNE = {"fc.lora_a.weight": DOWN, "fc.lora_b.weight": UP}
TUNE_FIELDS = {"r": 2, "lora_alpha": 6, "peft_type": "LORA", "target_modules": ["fc"]}
HEADED = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(3, 5)})})
HEADED.config = SimpleNamespace(model_type="other", num_attention_heads=4)  # type: ignore[assignment]
TORCHTUNE: list[Row] = [
    (FC_TUNE, {}, {"base": None}, "pass base=, the model that it is for"),
    (FC_TUNE, {"lora_alpha": None}, {}, "lora_alpha"),
    (FC_TUNE, {"r": 3}, {}, r"fc\.lora_a\.weight \(2, 3\) should be of rank 3 by adapter_config"),
    (FC_TUNE, {"peft_type": "LOHA", "lora_alpha": None, "alpha": 3}, {}, "is LOHA, not LORA"),
    (FC_TUNE | {"fc.lora_c.weight": (2,)}, {}, {}, r"no known use: fc\.lora_c"),
    (FC_TUNE | {"head.magnitude": (7,)}, {}, {}, r"half of a pair.*head\.magnitude"),
    (FC_TUNE | {"fc.magnitude": (3,)}, {}, {}, r"fc\.magnitude is \(3,\), expected \(5,\)"),
    ({key.replace("fc", "attn.w9"): shape for key, shape in FC_TUNE.items()}, {}, {},
     r"no layer of the base is called attn\.w9"),
    ({key.replace("fc", "attn.q_proj"): shape for key, shape in FC_TUNE.items()}, {},
     {"base": HEADED}, "the base is a 'other': which rows"),
]  # fmt: skip
# Of formats with a config beside the file, what both are called, and sound fields.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlx": ("adapters.safetensors", MLX_FIELDS),
    "torchtune": ("adapter_model.safetensors", TUNE_FIELDS),
}
# Of each format the rows, and a sound file: its metadata, and the hints that it is read by.
FORMATS: dict[str, tuple[list[Row], Stored, Any, dict[str, Any]]] = {
    "kohya": (KOHYA, LORA, None, {"base": BASE}),
    "loralib": (LORALIB, FC, None, {"base": BASE, "alpha": 3}),
    "diffusers": (DIFFUSERS, UNET, CONFIG, {}),
    "peft_file": (PEFT_FILE, PEFT, None, {"alpha": 3}),
    "mlx": (MLX, FC_MLX, {}, {"base": BASE}),
    "torchtune": (TORCHTUNE, FC_TUNE, {}, {"base": BASE}),
}


def written(path: Path, form: str, stored: Stored, metadata: Any) -> Path:
    """A file; fields alone are PEFT's, under the key that both PEFT and diffusers have them by."""
    tensors = {k: torch.ones(t) if isinstance(t, tuple) else t for k, t in stored.items()}
    if form in CONFIGS:
        name, fields = CONFIGS[form]
        (path / "adapter_config.json").write_text(json.dumps(fields | metadata))
        save_file(tensors, path / name)
        return path
    if metadata is not None:
        whole = metadata if metadata.keys() & {METADATA, ALPHAS} else {METADATA: metadata}
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in whole.items()}
    save_file(tensors, path / "a.safetensors", metadata)
    return path / "a.safetensors"


@pytest.mark.parametrize(
    ("form", "row"),
    [(form, row) for form, (rows, *_) in FORMATS.items() for row in rows],
    ids=lambda part: part if isinstance(part, str) else part[-1],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, form: str, row: Row) -> None:
    stored, metadata, hints, message = row
    hints = {"base": BASE, **hints} if "base" in FORMATS[form][-1] else hints
    with pytest.raises(AdapterError, match=message):
        load_adapter(written(tmp_path, form, stored, metadata), **hints)


@pytest.mark.parametrize("form", FORMATS)
def test_the_pair_that_the_rows_change_is_read(tmp_path: Path, form: str) -> None:
    _, stored, metadata, hints = FORMATS[form]
    adapter = load_adapter(written(tmp_path, form, stored, metadata), **hints)
    assert [path.removeprefix("unet.") for path in adapter.updates] == ["fc"]
