"""The trainer: `python -m opd_titan.train --job.config_file train_configs/debug.toml`."""

from __future__ import annotations

from opd_titan.cli.exits import exit_code, run_and_leave
from opd_titan.config import load_config


def main(argv: list[str]) -> int:
    """Run one training job.

    Returns:
        The exit code: 0 done; 1 failed, with one line on stderr; 2 wrong input, with one line on
        stderr; 75 stopped by a signal after a complete checkpoint. A bug raises its exception.
    """

    def job() -> int:
        config = load_config(argv)
        # Not before, because a mistake in the options should be reported without importing torch.
        from opd_titan.cli.run import run

        return run(config)

    return exit_code(job)


if __name__ == "__main__":
    run_and_leave(main)
