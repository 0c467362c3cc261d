"""`python -m opd_titan.view outputs/debug` writes `outputs/debug/rollouts.html`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from opd_titan.errors import ConfigError, UserError, print_error
from opd_titan.view.page import write_page

DESCRIPTION = """\
Write one self-contained HTML page with a run's rollouts. Each token is shaded by how much the
teacher disagrees, with log-probs, ranks and the teacher's alternatives. The page also shows the
run's curves."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise, instead of printing the usage and exiting."""
        raise ConfigError(f"{message}; see --help")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m opd_titan.view", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("dump_folder", type=Path, help="job.dump_folder of the run")
    parser.add_argument(
        "--out", type=Path, help="the page to write (default: <dump_folder>/rollouts.html)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Write the page. Return 0, or 2 and one line on stderr if the input is wrong."""
    try:
        options = _arguments(argv)
        out = options.out or options.dump_folder / "rollouts.html"
        packed = write_page(options.dump_folder, out)
    except UserError as error:
        print_error(error)
        return 2
    size = out.stat().st_size / 1e6
    print(f"{out}: {packed.count:,} rollouts of {len(packed.steps):,} steps, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
