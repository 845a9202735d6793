"""What every test may ask for; models, adapters and the judge are in `lora_fx.testing`."""

from __future__ import annotations

import gc
import os
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from hypothesis import settings
from torch._subclasses import fake_tensor

pytest.register_assert_rewrite("lora_fx.testing")

from lora_fx.testing import Ragged, Shared  # noqa: E402  # after it is told to explain its asserts

torch.set_num_threads(1)

# xdist's, or readline's, which os.environ has not heard of: the command line would fold to it.
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")
# No test reads where in a model's code a node comes from, and below pytest its stack is deep. Nor
# where a seed was set for a device that is not there, or where tensors without data were made.
torch.fx.config.do_not_emit_stack_traces = True
for module in (torch.cuda, torch.xpu, torch.mtia, fake_tensor):
    stacks = SimpleNamespace(format_stack=list, extract_stack=list, format_list=list)
    module.traceback = stacks  # type: ignore[attr-defined]
gc.set_threshold(200_000, 20, 50)
# The same examples in every run: a change is judged by what it changed.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


NUMBERS = count()


class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Threads that wait spin, and would take the cores of the tests beside."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


onnxruntime.SessionOptions = OneThread


def pytest_collection_finish() -> None:
    """What was imported stays, and who collects garbage need not walk it each time.

    Leaves out PEFT's README beside each adapter, whose template is compiled anew each time.
    """
    gc.freeze()
    if "peft" in sys.modules:
        sys.modules["peft"].PeftModel.create_or_update_model_card = lambda *_: None


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a parent of its own: exports look there too, at what a dead one has left."""
    made = tmp_path_factory.getbasetemp() / "each" / str(next(NUMBERS)) / "tmp"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def ragged() -> Ragged:
    torch.manual_seed(0)
    return Ragged().eval()


@pytest.fixture
def shared() -> Shared:
    torch.manual_seed(0)
    return Shared().eval()


@pytest.fixture
def x() -> torch.Tensor:
    """A batch (4, 7) of 3 features."""
    return torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))
