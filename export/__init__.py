"""From a graph to a verified ONNX file, its adapter files, and a session that runs both."""

from lora_fx.export.exporter import to_onnx
from lora_fx.export.quantization.quantize_onnx import quantize_onnx
from lora_fx.export.report import ExportReport
from lora_fx.export.rewriting.add_lora import add_lora
from lora_fx.export.rewriting.merge import merge_onnx
from lora_fx.export.runtime.calibration import CalibrationReader
from lora_fx.export.runtime.session import Session
from lora_fx.export.slots.adapter_file import export_adapter
from lora_fx.export.slots.adapter_report import AdapterReport
from lora_fx.export.slots.choose import slots_for
from lora_fx.export.verification.verify_onnx import verify_onnx

__all__ = [
    "AdapterReport",
    "CalibrationReader",
    "ExportReport",
    "Session",
    "add_lora",
    "export_adapter",
    "merge_onnx",
    "quantize_onnx",
    "slots_for",
    "to_onnx",
    "verify_onnx",
]
