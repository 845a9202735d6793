"""Some damaged files of every format; ``make fuzz`` reads many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILES = int(os.environ.get("LORA_FX_FILES", "400"))
FIRST = int(os.environ.get("LORA_FX_FROM", "0"))


def test_damaged_files_are_refused_or_read() -> None:
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(FILES), str(FIRST)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "'refused': " in done.stdout
    assert "'read': " in done.stdout
