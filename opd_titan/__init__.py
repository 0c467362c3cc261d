"""opd_titan: on-policy distillation, PyTorch-native."""

__version__ = "0.1.0"
