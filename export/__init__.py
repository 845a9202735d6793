"""From a graph to a verified ONNX file, its adapter files, and a session that runs both.

Each name is loaded when it is first read: what merges or runs a file loads nothing that traces.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fx.export.exporter import to_onnx
    from lora_fx.export.quantization.quantize_onnx import quantize_onnx
    from lora_fx.export.report import ExportReport
    from lora_fx.export.rewriting.add_lora import add_lora
    from lora_fx.export.rewriting.merge import merge_onnx
    from lora_fx.export.rewriting.one_decoder import join_decoders
    from lora_fx.export.runtime.calibration import CalibrationReader
    from lora_fx.export.runtime.session import Session
    from lora_fx.export.slots.adapter_file import export_adapter
    from lora_fx.export.slots.adapter_report import AdapterReport
    from lora_fx.export.slots.choose import slots_for
    from lora_fx.export.verification.verify_onnx import verify_onnx

_PLACES = {
    "AdapterReport": "slots.adapter_report",
    "CalibrationReader": "runtime.calibration",
    "ExportReport": "report",
    "Session": "runtime.session",
    "add_lora": "rewriting.add_lora",
    "export_adapter": "slots.adapter_file",
    "join_decoders": "rewriting.one_decoder",
    "merge_onnx": "rewriting.merge",
    "quantize_onnx": "quantization.quantize_onnx",
    "slots_for": "slots.choose",
    "to_onnx": "exporter",
    "verify_onnx": "verification.verify_onnx",
}


if not TYPE_CHECKING:  # which would find no name wrong

    def __getattr__(name: str) -> Any:
        """Loads the module of a name when it is first read."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__


__all__ = [
    "AdapterReport",
    "CalibrationReader",
    "ExportReport",
    "Session",
    "add_lora",
    "export_adapter",
    "join_decoders",
    "merge_onnx",
    "quantize_onnx",
    "slots_for",
    "to_onnx",
    "verify_onnx",
]
