"""The evaluation: `python -m opd_titan.evaluate --evaluate.model PATH`; see `cli/evaluate.py`."""

from __future__ import annotations

from opd_titan.cli.evaluate import main
from opd_titan.cli.exits import run_and_leave

__all__ = ["main"]

if __name__ == "__main__":
    run_and_leave(main)
