"""The ONNX graph: layers found by module path, Q/DQ and codebooks written around them, FP16 and BF16 types."""
