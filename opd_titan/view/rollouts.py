"""Rollout files, checked: whatever else is wrong with one is said in a line that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from opd_titan.errors import DataError, first_line

_FILE = re.compile(r"step-(0|[1-9][0-9]{0,17})\.jsonl")
ROLES = ("student", "teacher", "reference")


# No log-prob, advantage or rank is as large.
_LARGEST = 1e12
_NUMBER = {int, float, type(None)}


@dataclass
class Rollout:
    """A row of a rollout file. Per-token values have an entry for each response token.

    Attributes:
        data_set: among several; None for the only one.
        pieces: text of each token; None in files of earlier versions.
        logprobs, ranks: by role, of the roles that are there; NaN where the file has null.
        advantages: None where there are none.
        correct: 0 wrong, 1 right, between the two a grader's score; None where it was not graded.
        top_sizes, top_texts, top_logprobs: how many of the teacher's likeliest tokens there are at
            each place, and these one after another; None where there is no teacher.
    """

    step: int
    prompt_index: int
    sample_index: int
    prompt: str
    response: str
    tokens: list[int]
    finish_reason: str
    answer: str | None
    correct: float | None
    data_set: str | None
    pieces: list[str] | None
    advantages: np.ndarray | None
    logprobs: dict[str, np.ndarray] = field(default_factory=dict)
    ranks: dict[str, np.ndarray] = field(default_factory=dict)
    top_sizes: list[int] | None = None
    top_texts: list[str] | None = None
    top_logprobs: np.ndarray | None = None

    @property
    def kl(self) -> float | None:
        """Mean of log S - log T over the tokens where both are known."""
        if not {"student", "teacher"} <= self.logprobs.keys():
            return None
        gaps = self.logprobs["student"] - self.logprobs["teacher"]
        gaps = gaps[~np.isnan(gaps)]
        return float(gaps.mean()) if gaps.size else None


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
    try:
        # As bytes, of which only "\n" ends a line: a text may hold other characters that Python
        # counts as such. And a file is decoded in blocks, in which nobody knows the line.
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _Row(path, number, line).rollout(step)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class _Row:
    """One line, and what may be wrong with it."""

    def __init__(self, path: Path, number: int, line: bytes) -> None:
        self.where = f"{path}: line {number}"
        try:
            self.values = json.loads(line.decode(), parse_constant=self._constant)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where}: is not UTF-8; damaged, or foreign") from error
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
            tokens=self._each("response_tokens", {int}, "token ids") or [],
            finish_reason=self._get("finish_reason", str, "a string"),
            answer=self._get("answer", str, "a string or null", null=True),
            correct=self._grade(),
            data_set=self._data_set(),
            pieces=self._each("response_pieces", {str}, "strings"),
            advantages=self._numbers("advantages"),
        )
        if row.step != step:
            self._fail(f"`step` is {row.step} in the file of step {step}")
        for role in ROLES:
            for name, found in (("logprobs", row.logprobs), ("ranks", row.ranks)):
                values = self._numbers(f"{role}_{name}")
                if values is not None:
                    found[role] = values
        self._read_top(row)
        return row

    def _grade(self) -> float | None:
        value = self.values.get("correct")
        if type(value) in (bool, int, float) and 0 <= value <= 1:
            return float(value)
        return self._get("correct", type(None), "true, false, a score from 0 to 1 or null")

    def _data_set(self) -> str | None:
        """Files of earlier versions have no such key."""
        known = "data_set" in self.values
        return self._get("data_set", str, "a string or null", null=True) if known else None

    def _read_top(self, row: Rollout) -> None:
        key, wanted = "teacher_top", "lists of [text, log-prob]"
        places = self._each(key, {list}, wanted)
        if places is None:
            return
        pairs = list(chain.from_iterable(places))
        self._check_types(key, pairs, {list}, wanted)
        if set(map(len, pairs)) - {2}:
            self._fail(
                f"`{key}` holds {_short(next(p for p in pairs if len(p) != 2))}; wanted {wanted}"
            )
        row.top_sizes = list(map(len, places))
        row.top_texts = [text for text, _ in pairs]
        self._check_types(key, row.top_texts, {str}, wanted)
        row.top_logprobs = self._as_array(key, [value for _, value in pairs])

    def _get(self, key: str, kind: type, wanted: str, null: bool = False) -> Any:
        if key not in self.values:
            self._fail(f"has no `{key}`; wanted a file that opd_titan wrote")
        value = self.values[key]
        if type(value) is not kind and not (null and value is None):
            self._fail(f"`{key}` is {_short(value)}; wanted {wanted}")
        return value

    def _each(self, key: str, types: set[type], wanted: str) -> Any:
        """A list with one entry a token; None where it is null, or of an earlier version."""
        values = self.values.get(key)
        if values is None:
            return None
        if type(values) is not list or len(values) != self.length:
            found = f"{len(values)} entries" if type(values) is list else "no list"
            self._fail(f"`{key}` has {found} for {self.length} tokens; wanted one each, or null")
        self._check_types(key, values, types, wanted)
        return values

    def _numbers(self, key: str) -> np.ndarray | None:
        values = self._each(key, _NUMBER, "numbers or null")
        return None if values is None else self._as_array(key, values)

    def _as_array(self, key: str, values: list[Any]) -> np.ndarray:
        """fp64, null as NaN."""
        self._check_types(key, values, _NUMBER, "numbers or null")
        try:
            array = np.array(values, dtype=np.float64)
        except OverflowError:  # an integer that no float holds
            array = np.array([np.inf])
        if (np.abs(array) > _LARGEST).any():
            self._fail(f"`{key}` holds a number beyond {_LARGEST:.0e}; wanted log-probs and such")
        return array

    def _check_types(self, key: str, values: list[Any], types: set[type], wanted: str) -> None:
        if set(map(type, values)) - types:
            odd = next(value for value in values if type(value) not in types)
            self._fail(f"`{key}` holds {_short(odd)}; wanted {wanted}")

    def _constant(self, name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    def _fail(self, what: str) -> NoReturn:
        raise DataError(f"{self.where}: {what}")


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
