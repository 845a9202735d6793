from __future__ import annotations

from pathlib import Path

import pytest

# What PEFT says of itself, and of what these tests ask of it on purpose.
SAID = (
    # PEFT 0.21.2 asks transformers 5.23 for an attribute by the name it had before.
    "`is_gradient_checkpointing` is deprecated:FutureWarning",
    # PEFT turns its own default of fan_in_fan_out around when it meets a Conv1D.
    "fan_in_fan_out is set to",
    # PEFT takes the one-dimensional lora_B.bias for a damaged matrix.
    "Adapter .* have invalid shape",
    # A layer without bias cannot be merged under lora_bias, nor can groups.
    "`lora_bias=True` was passed but the targeted layer",
    "LoRA adapter added to ConvNd layer with groups > 1",
    # PEFT advises against seeds.
    "Specified to not (load|save) vera_A and vera_B",
    # PEFT does not see the keys of parameters and of AdaLoRA's masks.
    "The following (rank|alpha)_pattern keys did not match",
    # PEFT stores an embedding whole, and advises on ties.
    "Setting `save_embedding_layers` to `True`",
    "Model has `tie_word_embeddings=True` and a tied layer",
    "You have requested `ensure_weight_tying`, but no tied",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for message in SAID:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
