"""Rollout files, checked: whatever else is wrong with one is said in a line that names it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from opd_titan.errors import DataError, first_line

_FILE = re.compile(r"step-(0|[1-9][0-9]{0,17})\.jsonl")
ROLES = ("student", "teacher", "reference")


@dataclass
class Rollout:
    """A row of a rollout file. Lists have an entry for each response token; None: not there.

    Attributes:
        pieces: text of each token; None in files of earlier versions.
        logprobs, ranks: by role, of the roles that are there.
        top: the teacher's likeliest tokens with their log-probs, likeliest first.
    """

    step: int
    prompt_index: int
    sample_index: int
    prompt: str
    response: str
    tokens: list[int]
    finish_reason: str
    answer: str | None
    correct: bool | None
    pieces: list[str] | None
    advantages: list[float | None] | None
    logprobs: dict[str, list[float | None]] = field(default_factory=dict)
    ranks: dict[str, list[int | None]] = field(default_factory=dict)
    top: list[list[list[Any]]] | None = None

    @property
    def kl(self) -> float | None:
        """Mean of log S - log T over the tokens where both are known."""
        pairs = zip(self.logprobs.get("student", ()), self.logprobs.get("teacher", ()))  # noqa: B905
        gaps = [s - t for s, t in pairs if s is not None and t is not None]
        return sum(gaps) / len(gaps) if gaps else None


def rollout_files(dump_folder: Path) -> list[tuple[int, Path]]:
    """The steps that there are files of, in order; other files are left alone.

    Raises:
        DataError: there are none.
    """
    folder = dump_folder / "rollouts"
    try:
        found = [(p, _FILE.fullmatch(p.name)) for p in folder.iterdir()]
    except OSError as error:
        raise DataError(
            f"{dump_folder}: has no folder rollouts that can be read ({error.strerror}); wanted "
            "the job.dump_folder of a run with metrics.sample_rollouts above 0, or -1"
        ) from error
    files = sorted((int(match[1]), path) for path, match in found if match)
    if not files:
        raise DataError(
            f"{folder}: holds no step-N.jsonl; a run writes them where metrics.sample_rollouts is "
            "not 0 and the student samples (rollout.on_policy_fraction above 0)"
        )
    return files


def read_rollouts(step: int, path: Path) -> Iterator[Rollout]:
    """The rows of one file.

    Raises:
        DataError: in one line, which line of which file is wrong, and how.
    """
    number = 0
    try:
        # Only "\n" ends a line: a text may hold other characters that Python counts as such.
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield _Row(path, number, line).rollout(step)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number + 1}: is not UTF-8; damaged, or foreign") from error


class _Row:
    """One line, and what may be wrong with it."""

    def __init__(self, path: Path, number: int, line: str) -> None:
        self.where = f"{path}: line {number}"
        try:
            self.values = json.loads(line, parse_constant=self._constant)
        except (ValueError, RecursionError) as error:
            what = first_line(error)
            raise DataError(f"{self.where}: is not JSON ({what}); damaged, or cut off") from error
        if not isinstance(self.values, dict):
            raise DataError(f"{self.where}: is no JSON object; wanted a rollout")

    def rollout(self, step: int) -> Rollout:
        tokens = self._get("response_tokens", list, "a list of token ids")
        self.length = len(tokens)
        row = Rollout(
            step=self._get("step", int, "an integer"),
            prompt_index=self._get("prompt_index", int, "an integer"),
            sample_index=self._get("sample_index", int, "an integer"),
            prompt=self._get("prompt", str, "a string"),
            response=self._get("response", str, "a string"),
            tokens=self._each("response_tokens", lambda v: type(v) is int, "token ids") or [],
            finish_reason=self._get("finish_reason", str, "a string"),
            answer=self._get("answer", str, "a string or null", null=True),
            correct=self._get("correct", bool, "true, false or null", null=True),
            pieces=self._each("response_pieces", lambda v: type(v) is str, "strings"),
            advantages=self._each("advantages", _is_number, "numbers or null"),
            top=self._each("teacher_top", _is_top, "lists of [text, log-prob]"),
        )
        if row.step != step:
            self._fail(f"`step` is {row.step} in the file of step {step}")
        for role in ROLES:
            logprobs = self._each(f"{role}_logprobs", _is_number, "numbers or null")
            ranks = self._each(f"{role}_ranks", _is_rank, "integers or null")
            if logprobs is not None:
                row.logprobs[role] = logprobs
            if ranks is not None:
                row.ranks[role] = ranks
        return row

    def _get(self, key: str, kind: type, wanted: str, null: bool = False) -> Any:
        if key not in self.values:
            self._fail(f"has no `{key}`; wanted a file that opd_titan wrote")
        value = self.values[key]
        if type(value) is not kind and not (null and value is None):
            self._fail(f"`{key}` is {json.dumps(value)[:80]}; wanted {wanted}")
        return value

    def _each(self, key: str, fits: Callable[[Any], bool], wanted: str) -> Any:
        """A list with one entry a token; None where it is null, or of an earlier version."""
        values = self.values.get(key)
        if values is None:
            return None
        if type(values) is not list or len(values) != self.length:
            found = f"{len(values)} entries" if type(values) is list else "no list"
            self._fail(f"`{key}` has {found} for {self.length} tokens; wanted one each, or null")
        if not all(map(fits, values)):
            odd = next(value for value in values if not fits(value))
            self._fail(f"`{key}` holds {json.dumps(odd)[:80]}; wanted {wanted}")
        return values

    def _constant(self, name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    def _fail(self, what: str) -> NoReturn:
        raise DataError(f"{self.where}: {what}")


def _is_number(value: Any) -> bool:
    return value is None or type(value) is int or (type(value) is float and math.isfinite(value))


def _is_rank(value: Any) -> bool:
    return value is None or type(value) is int


def _is_top(value: Any) -> bool:
    return type(value) is list and all(
        type(pair) is list and len(pair) == 2 and type(pair[0]) is str and _is_number(pair[1])
        for pair in value
    )
