"""Clients run in a process of their own, with packages of their own in front of the usual ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CLIENTS = os.environ.get("LORA_FX_CLIENTS", "")
collect_ignore = [] if CLIENTS else ["test_clients.py"]


@pytest.fixture(scope="session")
def client() -> Any:
    """Runs a function of ``load.py`` on arguments that JSON holds, and gives what it returns."""

    def run(name: str, *arguments: Any) -> Any:
        script = Path(__file__).with_name("load.py")
        given = json.dumps([name, *map(_plain, arguments)])
        packages = {"PYTHONPATH": str(Path(CLIENTS).resolve()), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, str(script), given],
            env=os.environ | packages,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
