"""onnxruntime: opened and called."""
