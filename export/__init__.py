"""From a graph to a verified ONNX file, its adapter files, and a session that runs both."""

from lora_fx.export.adapter_file import export_adapter
from lora_fx.export.exporter import to_onnx
from lora_fx.export.recheck import verify_onnx
from lora_fx.export.report import ExportReport
from lora_fx.export.session import Session

__all__ = ["ExportReport", "Session", "export_adapter", "to_onnx", "verify_onnx"]
