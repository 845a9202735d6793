from __future__ import annotations

from typing import Any

import numpy as np

from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.export_unit import export_unit


def test_a_trial_feeds_each_case_under_the_models_names(sample: Any) -> None:
    trial = export_unit(sample.gm, example_inputs(sample.gm, None, None, None))
    assert trial.inputs == list(sample.other)
    for case in trial.cases:
        feeds = trial.feeds(case)
        assert list(feeds) == trial.inputs
        assert all(np.array_equal(feeds[name], case.kwargs[name]) for name in feeds)
    assert len(trial.cases) == 3
