"""opd_titan: on-policy distillation, PyTorch-native."""

import os

__version__ = "0.1.0"

# Here, because every program imports this package before torch, which reads it. Phases take turns
# with memory: segments that grow leave no holes between what they allocate.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
