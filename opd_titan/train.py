"""The program: `python -m opd_titan.train --job.config_file train_configs/debug.toml`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from opd_titan.config import load_config
from opd_titan.errors import UserError


def main(argv: list[str]) -> int:
    """Run one job.

    Returns:
        The exit code: 0 done; 2 the user's input is wrong, said in one line on stderr; 75 stopped
        on a signal after a good checkpoint. A fault raises, which is exit code 1.
    """
    try:
        config = load_config(argv)
        # Only now: a mistyped option should not have to wait for torch.
        from opd_titan.trainer import Trainer

        return Trainer(config).train()
    except UserError as error:
        _tell(error)
        return 2


def _tell(error: UserError) -> None:
    """One line on stderr. Every rank meets the same mistake, so under a launcher it speaks."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is None:
        print(f"opd_titan: {error}", file=sys.stderr)
    else:
        message = {"message": str(error), "timestamp": int(time.time())}
        Path(report).write_text(json.dumps(message), encoding="utf-8")


def _leave(code: int) -> None:
    """Exit without waiting for ranks that may never come to a collective."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
