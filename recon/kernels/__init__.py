"""Kernels for inference on NVIDIA GPUs of compute capability 9.0, written in Triton, each with a plain torch twin.

`ops` is what the networks call; `reference` holds the twins; `transformer` builds fast transformer blocks from them;
`graphs` captures a module as a CUDA graph; `form` writes fast networks to files and back, and `record` notes what one
multiplies while it runs. Nothing here is imported where a network is only exported.
"""

FORM_VERSION = "form.7"
"""Raise when the tensors of a fast network get other names or meanings, or when kernels compute something else: engines
are then built, certified and compared with FP32 anew."""
