"""Low precision carried out by PyTorch: modules that multiply in FP8 and INT8, and weights stored in 8 and 4 bits.

`support.refusal` says what a device can do and needs no torch to import; `apply.prepare` turns an FP32 module and a
recipe into one that runs, exports and compiles.
"""

EXAMPLE_SEEDS = (0, 1)
"""Seeds of the example inputs that show which layers FP16 cannot hold, beside what calibration saw."""
