"""The compiler between a fine-tuned PyTorch model and ONNX: trace, inject, fold, export, run.

``import lora_fx`` loads torch alone; what needs onnx or onnxruntime is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fx.adapter import Adapter, Update
    from lora_fx.api import fold, inject, unfold
    from lora_fx.branches import adapter_from
    from lora_fx.compare import compare
    from lora_fx.config import LoraConfig
    from lora_fx.errors import (
        AdapterError,
        AdapterWarning,
        ExportError,
        LoraFxError,
        PassError,
        TraceError,
        VerificationError,
    )
    from lora_fx.export import ExportReport, Session, export_adapter, to_onnx
    from lora_fx.formats import load_adapter, save_adapter
    from lora_fx.text import text
    from lora_fx.trace import trace

# Public name -> the module that defines it.
_HOMES = {
    "Adapter": "lora_fx.adapter",
    "Update": "lora_fx.adapter",
    "fold": "lora_fx.api",
    "inject": "lora_fx.api",
    "unfold": "lora_fx.api",
    "adapter_from": "lora_fx.branches",
    "compare": "lora_fx.compare",
    "LoraConfig": "lora_fx.config",
    "AdapterError": "lora_fx.errors",
    "AdapterWarning": "lora_fx.errors",
    "ExportError": "lora_fx.errors",
    "LoraFxError": "lora_fx.errors",
    "PassError": "lora_fx.errors",
    "TraceError": "lora_fx.errors",
    "VerificationError": "lora_fx.errors",
    "ExportReport": "lora_fx.export",
    "Session": "lora_fx.export",
    "export_adapter": "lora_fx.export",
    "to_onnx": "lora_fx.export",
    "load_adapter": "lora_fx.formats",
    "save_adapter": "lora_fx.formats",
    "text": "lora_fx.text",
    "trace": "lora_fx.trace",
}


def __getattr__(name: str) -> Any:
    """Loads a public name's module when the name is first read."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_fx' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(_HOMES)


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
    "adapter_from",
    "compare",
    "export_adapter",
    "fold",
    "inject",
    "load_adapter",
    "save_adapter",
    "text",
    "to_onnx",
    "trace",
    "unfold",
]
