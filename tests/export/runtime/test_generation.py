from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn

from lora_fx import ExportError, Session, inject, tasks, to_onnx
from lora_fx.export import export_adapter
from lora_fx.export.runtime.generation import empty_cache
from lora_fx.graph.example import NEW_CACHE
from lora_fx.testing import make_adapter

LENGTH = 16  # of the texts that Phi-3's short factors are for
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0,
    "eos_token_id": None, "original_max_position_embeddings": LENGTH,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": LENGTH,
    },
}  # fmt: skip


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of so many tokens, padded on the left, and their mask."""
    make, longest = torch.Generator().manual_seed(3), max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 97, mask.shape, generator=make) * mask, mask


@pytest.mark.parametrize("shared_cache", [False, True])
def test_a_cache_is_begun_anew_where_all_positions_turn_otherwise(
    tmp_path: Path, shared_cache: bool
) -> None:
    torch.manual_seed(0)
    model: Any = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "base")
    (part,) = tasks.load(tmp_path / "base", "text-generation-with-past")
    layer = "model.layers.0.mlp.down_proj"
    adapter = make_adapter({layer: (32, 48)}, scale=0.5)
    gm, file = part.traced(), tmp_path / "model.onnx"
    to_onnx(inject(gm, adapter), file, adapters="input", shared_cache=shared_cache)
    active = export_adapter(adapter, file, tmp_path / "a.onnx_adapter").path
    noted = onnx.load(file)
    kept = [each for each in noted.metadata_props if each.key != NEW_CACHE]
    assert len(kept) == len(noted.metadata_props) - 1
    del noted.metadata_props[:]
    noted.metadata_props.extend(kept)
    onnx.save(noted, tmp_path / "without.onnx")
    with pytest.raises(ExportError, match=f"not what was exported: its manifest or {NEW_CACHE} "):
        Session(tmp_path / "without.onnx")
    session, without = Session(file), Session(tmp_path / "without.onnx", check=False)
    for lengths in ((10, 4), (LENGTH,), (LENGTH + 1,)):  # below, at and behind the length
        ids, mask = prompts(*lengths)
        said: Any = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12}
        wanted = model.generate(**said, do_sample=False).numpy()
        given: Any = {"attention_mask": mask, "eos_token_id": []}
        assert np.array_equal(session.generate(ids, 12, **given), wanted)
        assert not np.array_equal(session.generate(ids, 12, adapter=active, **given), wanted)
        crosses = max(lengths) <= LENGTH
        assert np.array_equal(without.generate(ids, 12, **given), wanted) is not crosses


@pytest.mark.parametrize("shared_cache", [False, True])
def test_a_text_behind_the_last_position_is_refused(tmp_path: Path, shared_cache: bool) -> None:
    """A run with bound memory has another error than any other run."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97, "n_positions": 24}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    model: Any = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    (part,) = tasks.load(tmp_path / "base", "text-generation-with-past")
    file = tmp_path / "model.onnx"
    to_onnx(part.traced(), file, shared_cache=shared_cache)
    session, ids = Session(file), prompts(20)[0]
    assert session.generate(ids, 5, eos_token_id=[]).shape == (1, 25)
    with pytest.raises(ExportError, match=r"^onnxruntime: .*idx=24"):
        session.generate(ids, 6, eos_token_id=[])


def test_a_cache_that_numpy_has_no_numbers_for_is_refused() -> None:
    name = "past_key_values.0.key"
    given = {
        kind: SimpleNamespace(name=name, type=f"tensor({kind})", shape=["batch", 2, "past", 4])
        for kind in ("bfloat16", "float16")
    }
    taken, known = (SimpleNamespace(get_inputs=lambda v=v: [v]) for v in given.values())
    with pytest.raises(ExportError, match=r"key is tensor\(bfloat16\).*export the model in float"):
        empty_cache(taken, {}, 1)
    assert empty_cache(known, {}, 3)[name].shape() == [3, 2, 0, 4]
