"""The compiler between a fine-tuned PyTorch model and ONNX: trace, inject, fold, export, run.

``import lora_fx`` loads nothing: each name is loaded, with torch and what else it needs, when it is
first read. So ``lora-fx --help`` answers at once, and can be interrupted at any time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fx import export, passes, report, tasks, testing
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
    from lora_fx.export import AdapterReport, ExportReport, Session, export_adapter, to_onnx
    from lora_fx.formats import load_adapter, save_adapter
    from lora_fx.frontend.trace import trace
    from lora_fx.graph.printer import text
    from lora_fx.injection.read_adapter import adapter_from
    from lora_fx.numerics import compare

    __version__: str

# The module that defines what -> the public names; none of them is a module of this package.
_DEFINED = {
    "lora_fx.adapters.adapter": ("Adapter", "Update"),
    "lora_fx.adapters.extraction": ("extract",),
    "lora_fx.adapters.lora_config": ("LoraConfig",),
    "lora_fx.adapters.merging": ("combine",),
    "lora_fx.api": ("fold", "inject", "unfold"),
    "lora_fx.errors": (
        *("AdapterError", "AdapterWarning", "ExportError", "LoraFxError", "PassError"),
        *("TraceError", "VerificationError"),
    ),
    "lora_fx.explanation": ("explain",),
    "lora_fx.export": ("AdapterReport", "ExportReport", "Session", "export_adapter", "to_onnx"),
    "lora_fx.formats": ("load_adapter", "save_adapter"),
    "lora_fx.frontend.trace": ("trace",),
    "lora_fx.graph.printer": ("text",),
    "lora_fx.injection.read_adapter": ("adapter_from",),
    "lora_fx.numerics": ("compare",),
}
_PLACES = {name: module for module, names in _DEFINED.items() for name in names}
_ROOMS = {"export", "passes", "report", "tasks", "testing"}


if not TYPE_CHECKING:  # which would find no name wrong

    def __getattr__(name: str) -> Any:
        """Loads a room when it, or one of its names, is first read."""
        if name in _ROOMS:
            return import_module(f"lora_fx.{name}")  # which makes it an attribute
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("lora-fx")
        elif name in _PLACES:
            value = getattr(import_module(_PLACES[name]), name)
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
    "AdapterReport",
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
