"""Helpers of engine=onnxruntime: what an optimised graph says of itself, what each provider can run."""
