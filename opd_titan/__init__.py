"""opd_titan: on-policy distillation, PyTorch-native."""

import os

__version__ = "0.1.0"

# Set here, because every program imports this package before torch, which reads it. The phases of a
# step use the memory in turn: segments that can grow leave no holes between their tensors.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
