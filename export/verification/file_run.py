"""What onnxruntime makes of a file, with an adapter or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.export.runtime.active_adapter import activated
from lora_fx.export.runtime.ort import call, open_session
from lora_fx.export.slots.manifest import Manifest

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Run:
    """A file, with an adapter or without.

    Attributes:
        path: the model file.
        adapter: the adapter file, or None.
        manifest: of the file, if it has slots.
        known: what it gave already: whether optimised, and label -> output name -> array.
    """

    path: Path
    adapter: Path | None = None
    manifest: Manifest | None = None
    known: dict[tuple[bool, str], Feeds] = field(default_factory=dict, compare=False)

    def outputs(
        self, feeds: Mapping[str, Feeds], *, optimise: bool = True, session: Any = None
    ) -> dict[str, Feeds]:
        """What it gives: label -> output name -> array; a label has the same inputs each time.

        Args:
            feeds: the inputs, by label.
            optimise: whether onnxruntime changes the graph before it runs it.
            session: one of the file, opened so; None: one of its own, if it has to run.
        """
        if any((optimise, label) not in self.known for label in feeds):
            if session is None:
                session = open_session(self.path, threads=1, optimise=optimise, to_check=True)
            active = activated(session, self.path, self.manifest, self.adapter)
            for label, each in feeds.items():
                given = each | active.feeds
                self.known[optimise, label] = as_arrays(call(session, given, active.options))
        return {label: self.known[optimise, label] for label in feeds}


def as_arrays(outputs: Mapping[str, Any]) -> Feeds:
    """What a file gives as arrays: each of a sequence by its place, and words as codes.

    An output that is optional and left out is none.
    """
    found: Feeds = {}
    for name, value in outputs.items():
        if isinstance(value, list):
            found |= as_arrays({f"{name}[{place}]": each for place, each in enumerate(value)})
        elif value is not None:
            array = np.asarray(value)
            is_words = array.dtype.kind in "OU"
            found[name] = np.vectorize(hash, [np.int64])(array) if is_words else array
    return found


def first_of(feeds: Mapping[str, Feeds]) -> dict[str, Feeds]:
    """The inputs of one run."""
    return dict(list(feeds.items())[:1])
