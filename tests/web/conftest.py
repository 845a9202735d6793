"""Node and a headless browser, with the packages that ``make test-web`` installs."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

WEB = os.environ.get("LORA_FX_WEB", "")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
collect_ignore = [] if WEB else ["test_runtimes.py", "test_page.py", "test_transformers_js.py"]


def run(script: str, **job: Any) -> Any:
    """What a script of this directory prints, given a job."""
    done = subprocess.run(
        ["node", str(HERE / script)],
        input=json.dumps(job),
        env=os.environ | {"LORA_FX_WEB": str(Path(WEB).resolve())},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A directory with the packages and our modules in it, and its address."""
    site = tmp_path_factory.mktemp("site")
    (site / "node_modules").symlink_to(Path(WEB).resolve() / "node_modules")
    for name in ("tests", "examples"):
        (site / name).symlink_to(ROOT / name)
    (site / "empty.html").write_text("<!doctype html><title>empty</title>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield site, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
