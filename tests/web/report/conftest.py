"""A page is opened in a browser where ``LORA_FX_WEB`` is set, as ``make test-web`` does."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("LORA_FX_WEB") else ["test_browser.py"]
