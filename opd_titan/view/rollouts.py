"""Find and read the rollout files of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from opd_titan.errors import DataError, first_line

_FILE = re.compile(r"step-(0|[1-9][0-9]{0,17})\.jsonl")


def rollout_files(dump_folder: Path) -> list[Path]:
    """Return the files `rollouts/step-N.jsonl` in the order of their steps.

    Raises:
        DataError: there are none.
    """
    folder = dump_folder / "rollouts"
    try:
        found = [(_FILE.fullmatch(path.name), path) for path in folder.iterdir()]
    except OSError as error:
        raise DataError(
            f"{dump_folder}: has no folder rollouts that can be read ({error.strerror}); wanted "
            "the job.dump_folder of a run with metrics.sample_rollouts not 0"
        ) from error
    files = sorted((int(match[1]), path) for match, path in found if match)
    if not files:
        raise DataError(
            f"{folder}: has no step-N.jsonl; a run writes them if metrics.sample_rollouts is not 0 "
            "and the student samples (rollout.on_policy_fraction above 0)"
        )
    return [path for _, path in files]


def read_lines(path: Path, use: Callable[[bytes], None]) -> None:
    """Call `use` with each line of a file.

    Raises:
        DataError: names the file and the line that `use` failed on.
    """
    try:
        with path.open("rb") as file:  # in bytes only "\n" ends a line
            for number, line in enumerate(file, 1):
                try:
                    use(line)
                except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as e:
                    what = f"no key {e}" if isinstance(e, KeyError) else first_line(e)
                    raise DataError(
                        f"{path}: line {number} is not a rollout ({what}); the file is damaged, "
                        "truncated, or was not written by a run"
                    ) from e
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
