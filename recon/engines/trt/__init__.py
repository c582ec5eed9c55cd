"""What `engine=tensorrt` is made of: one code path for `tensorrt` 10.10 to 11.x, `tensorrt_rtx`, and the runtimes
`tensorrt_lean` and `tensorrt_dispatch`.

library: which module, and what it can do. messages: its one logger. targets: which GPU can hold which format.
profiles: ranges of dynamic shapes. builder, parsing, failures: ONNX to plan. plan: what is checked before a plan is
opened. shared, session: running it. layers: what TensorRT says is in a plan.
"""
