"""Models saved as transformers saves what bitsandbytes quantised, by the format's definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

# QLoRA (Dettmers et al., 2023), appendix E; fp4 is bitsandbytes'.
_FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25]
TABLES = {
    "nf4": torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ]
    ),
    "fp4": torch.tensor([*_FP4, *(-value for value in _FP4)]),
}
Tensors = dict[str, torch.Tensor]


def save_bitsandbytes(
    model: Any,
    directory: Path,
    kind: str = "nf4",
    *,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    block: int = 64,
    shards: int = 1,
) -> Tensors:
    """Saves a model of transformers with its linear layers but the head in a few bits.

    Args:
        model: of transformers; a Conv1D is quantised turned round, as transformers does.
        directory: to write.
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        nested: whether factors are in 8 bits themselves: double quantisation.
        storage: the type that holds the bytes of 4 bits.
        block: values that share a factor.
        shards: files to spread the tensors over.

    Returns:
        The weights of these layers as the model then has them, by name.
    """
    from safetensors.torch import save_file

    model.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers: Tensors = {}
    for path, module in model.named_modules():
        is_turned = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or is_turned) or path == "lm_head":
            continue
        own = state.pop(f"{path}.weight")
        own = own.T.contiguous() if is_turned else own
        in_table = kind != "int8"
        made, parts = _in_table(own, kind, nested, block, storage) if in_table else _in_rows(own)
        numbers[f"{path}.weight"] = made.T.contiguous() if is_turned else made
        state |= {f"{path}{end}": value for end, value in parts.items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    _save(state, directory, shards, save_file)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return numbers


def _in_table(
    weight: torch.Tensor, kind: str, nested: bool, block: int, storage: torch.dtype
) -> tuple[torch.Tensor, Tensors]:
    flat = weight.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * block))).reshape(-1, block)
    factors = padded.abs().amax(1)[: -(-len(flat) // block)]
    said: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32"}
    said["shape"] = list(weight.shape)
    parts = {"absmax": factors, "quant_map": TABLES[kind].clone()}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(factors.mean())
        groups = torch.nn.functional.pad(factors - offset, (0, -len(factors) % 256)).reshape(
            -1, 256
        )
        largest = groups.abs().amax(1)
        places = (groups / largest[:, None]).flatten()[: len(factors), None] - table
        parts["absmax"] = places.abs().argmin(1).to(torch.uint8)
        parts |= {"nested_absmax": largest, "nested_quant_map": table}
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        spread = largest.repeat_interleave(256)[: len(factors)]
        factors = table[parts["absmax"].int()] * spread + torch.tensor(offset)
    spread = factors.repeat_interleave(block)[: len(flat)]
    places = (flat / spread)[:, None] - TABLES[kind]
    found = places.abs().argmin(1).to(torch.uint8)
    even = torch.nn.functional.pad(found, (0, len(found) % 2))
    packed = (even[::2] << 4 | even[1::2]).view(storage).reshape(-1, 1)
    text = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    named = {f".weight.{name}": value for name, value in parts.items()}
    named |= {".weight": packed, f".weight.quant_state.bitsandbytes__{kind}": text}
    return (TABLES[kind][found.int()] * spread).reshape(weight.shape), named


def _in_rows(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    scales = weight.abs().amax(1)
    whole = (weight * 127 / scales[:, None]).round().to(torch.int8)
    parts = {".weight": whole, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return whole * scales[:, None] * (1 / 127), parts


def _save(state: Tensors, directory: Path, shards: int, save_file: Any) -> None:
    if shards == 1:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        return
    files: dict[str, Tensors] = {}
    for place, name in enumerate(sorted(state)):
        file = f"model-{place % shards + 1:05}-of-{shards:05}.safetensors"
        files.setdefault(file, {})[name] = state[name]
    for file, part in files.items():
        save_file(part, directory / file, {"format": "pt"})
    places = {name: file for file, part in files.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
