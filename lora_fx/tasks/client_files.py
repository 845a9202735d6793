"""What stands beside a model's file so that clients load the directory as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_fx.io.strict_json import read_json
from lora_fx.tasks.calls import Call

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".data", ".ot", ".gguf",
    ".ckpt", ".npz", ".tflite", ".onnx_adapter",
}  # fmt: skip
_OTHERS = {"README.md", "report.json", "adapter_config.json"}
Copies = dict[Path, Path]  # where to, relative -> where from
CONFIG, GENAI, MODULES = "config.json", "genai_config.json", "modules.json"


def companions(directory: Path) -> list[Path]:
    """What a model's directory holds beside its weights, by paths relative to it.

    Config, tokenizer and processor, whatever they are called, and the modules of a
    sentence-transformers model with all that they hold.
    """
    own = (path for path in sorted(directory.iterdir()) if path.is_file() and is_kept(path))
    return [path.relative_to(directory) for path in (*own, *_modules(directory))]


def write_companions(
    source: Path, out: Path, model: Any, call: Call, *, shared_cache: bool = False
) -> None:
    """Copies what a directory holds beside its weights, and adds what clients of decoders need.

    The config is copied as it is where it names the class that was exported, and its tokens, and
    quantises nothing; otherwise it is that of the exported model, whose head or table an adapter
    may have brought.

    Args:
        source: the directory of the model.
        out: where the model's file goes.
        model: as it was loaded.
        call: of it.
        shared_cache: whether its file lets a cache be written in place.
    """
    write_copies({path: source / path for path in companions(source)}, out)
    kept, tokens = read_json(source / CONFIG), getattr(model.config, "vocab_size", None)
    is_own = _class_in(kept) == type(model).__name__ and "quantization_config" not in kept
    if not is_own or kept.get("vocab_size", tokens) != tokens:
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    if call.generates:
        genai = genai_config(model.config, call, shared_cache=shared_cache)
        (out / GENAI).write_text(json.dumps(genai, indent=2) + "\n")


def write_copies(copies: Copies, out: Path) -> None:
    """Copies files into a directory."""
    for place, source in copies.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out / place)


def written_beside(source: Path, call: Call) -> list[str]:
    """The first names of all that `write_companions` writes."""
    names = [path.parts[0] for path in companions(source)]
    return list(dict.fromkeys([*names, *([GENAI] if call.generates else [])]))


def genai_config(config: Any, call: Call, *, shared_cache: bool) -> dict[str, Any]:
    """What onnxruntime-genai reads of a decoder.

    Source: onnxruntime-genai's ``docs`` and ``src/config.cpp`` of 0.13; type ``"decoder"`` is its
    general one.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    past = call.kwargs["past_key_values"]
    _, heads, _, size = past[0][0].shape
    longest = int(getattr(text, "max_position_embeddings", 0) or 2048)
    inputs = {name: name for name in call.kwargs if name != "past_key_values"}
    ends = _tokens(config, "eos_token_id")
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": (_tokens(config, "bos_token_id") or [0])[0],
            "eos_token_id": ends or [0],
            "pad_token_id": (_tokens(config, "pad_token_id") or ends or [0])[0],
            "context_length": longest,
            "vocab_size": int(text.vocab_size),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": int(size),
                "hidden_size": int(getattr(text, "hidden_size", heads * size)),
                "num_attention_heads": int(getattr(text, "num_attention_heads", heads)),
                "num_hidden_layers": len(past),
                "num_key_value_heads": int(heads),
                "inputs": inputs
                | {
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": longest,
            "do_sample": False,
            "past_present_share_buffer": shared_cache,
        },
    }


def _tokens(config: Any, name: str) -> list[int]:
    found = getattr(config, name, None)
    several = found if isinstance(found, list | tuple) else [found]
    return [int(token) for token in several if isinstance(token, int)]


def _class_in(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else None


def is_kept(path: Path) -> bool:
    """Whether a file of a model's directory holds neither weights nor words about them."""
    is_index = path.name.endswith(".index.json")
    hidden = path.name.startswith(".") or is_index
    return not hidden and path.suffix not in _WEIGHTS and path.name not in _OTHERS


def _modules(directory: Path) -> Iterator[Path]:
    """All files of the directories that ``modules.json`` names."""
    file = directory / MODULES
    entries = read_json(file) if file.is_file() else []
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("path") if isinstance(entry, dict) else None
        inner = directory / name if isinstance(name, str) and name else None
        if inner is None or inner.parent != directory or not inner.is_dir():
            continue
        yield from (path for path in sorted(inner.rglob("*")) if path.is_file())
