"""Kernels for inference on NVIDIA GPUs of compute capability 9.0, written in Triton, each with a plain torch twin.

`ops` is what the networks call; `reference` holds the twins; `transformer` builds fast transformer blocks from them;
`graphs` captures a module as a CUDA graph. Nothing here is imported where a network is only exported.
"""
