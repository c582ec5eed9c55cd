"""Deploy learned multi-view geometry on NVIDIA GPUs, prove what was deployed, and run it live."""

__version__ = "0.1.0"
