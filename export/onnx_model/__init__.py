"""The ONNX model: translated, optimized, written, and read back."""
