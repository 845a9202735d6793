"""Samples and their files, made once a session."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from lora_fx.testing import Exported, Outputs, Sample, sample_of, traced


@pytest.fixture(scope="session", params=["mlp", "bert", "gpt2"])
def sample(request: pytest.FixtureRequest) -> Sample:
    return sample_of(request.param)


@pytest.fixture(scope="session")
def mlp() -> Sample:
    return sample_of("mlp")


@pytest.fixture
def twin() -> fx.GraphModule:
    """The shapes of `mlp` with other weights."""
    torch.manual_seed(1)
    return traced(Outputs(), torch.randn(4, 7, 3))


@pytest.fixture(scope="session")
def exported(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(sample, tmp_path_factory.mktemp(sample.name))


@pytest.fixture(scope="session")
def exported_mlp(mlp: Sample, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(mlp, tmp_path_factory.mktemp("only_mlp"))
