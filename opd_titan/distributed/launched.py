"""Whether a launcher has started this process. This module does not import torch."""

from __future__ import annotations

import os

# Set by torchrun and by launchers like it. A batch system may set some of them in every shell.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Return whether this process is one of several that a launcher has started."""
    return all(name in os.environ for name in LAUNCHED)


def launched_rank() -> int:
    """Return the rank that the launcher has given this process; 0 without a launcher."""
    return int(os.environ["RANK"]) if is_launched() else 0
