"""ONNX-to-ONNX rewrites into the operators that onnxruntime runs fastest, one pass a file."""
