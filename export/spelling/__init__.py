"""What a graph computes, said in the operators that onnxruntime runs fastest."""
