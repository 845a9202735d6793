"""What is read of adapters before their model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_fx.errors import AdapterError
from lora_fx.tasks.adapter_task import AdapterTask, trained_for


def written(path: Path, task: str | None) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"task_type": task}))
    head = {"base_model.model.score.weight": torch.ones(3, 5)}
    save_file(head, path / "adapter_model.safetensors")
    return path


def test_the_task_and_the_shapes_of_a_directory(tmp_path: Path) -> None:
    found = trained_for([written(tmp_path / "a", "SEQ_CLS"), written(tmp_path / "b", None)])
    assert found == AdapterTask("SEQ_CLS", {"score.weight": (3, 5)})
    file = tmp_path / "a" / "adapter_model.safetensors"
    assert trained_for([file]) == found  # the config beside it is its own


def test_a_file_with_its_config_in_it(tmp_path: Path) -> None:
    config = json.dumps({"task_type": "TOKEN_CLS"})
    tensors = {"classifier.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    found = trained_for([tmp_path / "a.safetensors"])
    assert found == AdapterTask("TOKEN_CLS", {"classifier.weight": (2, 3)})


def test_no_task_is_none(tmp_path: Path) -> None:
    assert trained_for([]) == AdapterTask()
    assert trained_for([written(tmp_path / "a", None)]) == AdapterTask(
        None, {"score.weight": (3, 5)}
    )
    (tmp_path / "x.pt").write_bytes(b"")
    assert trained_for([tmp_path / "x.pt"]) == AdapterTask()


def test_two_tasks_are_refused(tmp_path: Path) -> None:
    paths = [written(tmp_path / "a", "SEQ_CLS"), written(tmp_path / "b", "CAUSAL_LM")]
    with pytest.raises(AdapterError, match=r"different tasks, .*a for SEQ_CLS, .*b for CAUSAL_LM"):
        trained_for(paths)
