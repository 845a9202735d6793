"""Anonymous memory of this process while something runs: what no file on disk stands behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """The largest growth seen, in MB."""

    megabytes: float = 0.0


def anonymous(process: int | str = "self") -> float:
    """Anonymous memory of a process now, in MB; of one that has just ended, none."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except ProcessLookupError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


@contextmanager
def peak(every: float = 0.02) -> Iterator[Peak]:
    """Samples memory while the body runs, above what there was before."""
    gc.collect()
    before, seen, done = anonymous(), Peak(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.megabytes = max(seen.megabytes, anonymous() - before)
            time.sleep(every)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
