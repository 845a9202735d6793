"""The compiler between a fine-tuned PyTorch model and ONNX: trace, inject, fold, export, run.

``import lora_fx`` loads torch alone; what needs onnx, onnxruntime or files is loaded when first
used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# Imported here and not lazily: `trace`, `compare` and `text` are functions and the modules they
# live in, and the name must always mean the function.
from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.adapters.extraction import extract
from lora_fx.adapters.lora_config import LoraConfig
from lora_fx.adapters.merging import combine
from lora_fx.api import fold, inject, unfold
from lora_fx.errors import (
    AdapterError,
    AdapterWarning,
    ExportError,
    LoraFxError,
    PassError,
    TraceError,
    VerificationError,
)
from lora_fx.explanation import explain
from lora_fx.frontend.trace import trace
from lora_fx.graph.printer import text
from lora_fx.injection.read_adapter import adapter_from
from lora_fx.numerics import compare

if TYPE_CHECKING:
    from lora_fx import export, passes, report, tasks, testing
    from lora_fx.export import ExportReport, Session, export_adapter, to_onnx
    from lora_fx.formats import load_adapter, save_adapter

    __version__: str

# Public name -> the room that defines it.
_LAZY = {
    "ExportReport": "lora_fx.export",
    "Session": "lora_fx.export",
    "export_adapter": "lora_fx.export",
    "to_onnx": "lora_fx.export",
    "load_adapter": "lora_fx.formats",
    "save_adapter": "lora_fx.formats",
}
_ROOMS = {"export", "passes", "report", "tasks", "testing"}


def __getattr__(name: str) -> Any:
    """Loads a room when it, or one of its names, is first read."""
    if name in _ROOMS:
        return import_module(f"lora_fx.{name}")  # which makes it an attribute
    if name == "__version__":
        value = version("lora-fx")
    elif name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'lora_fx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__


__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterWarning",
    "ExportError",
    "ExportReport",
    "LoraConfig",
    "LoraFxError",
    "PassError",
    "Session",
    "TraceError",
    "Update",
    "VerificationError",
    "__version__",
    "adapter_from",
    "combine",
    "compare",
    "explain",
    "export",
    "export_adapter",
    "extract",
    "fold",
    "inject",
    "load_adapter",
    "passes",
    "report",
    "save_adapter",
    "tasks",
    "testing",
    "text",
    "to_onnx",
    "trace",
    "unfold",
]
