"""ONNX files rewritten as they are, without the model that they came from."""
