"""Write rollouts to files for people and scripts: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_titan.data.pieces import TokenTexts
from opd_titan.data.types import Sample, TokenRanks
from opd_titan.grading.answers import after_prompt

# Legal inside JSON strings, but `str.splitlines` ends a line at each.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}

_FILE = re.compile(r"step-(0|[1-9][0-9]*)\.jsonl")


class OldRollouts:
    """Delete the rollouts of old steps, and no other file.

    Rollouts of later steps stay: a run that returned to an earlier step replaces them one by one.

    Args:
        keep: number of steps to keep, counted back from the newest one written; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._first = True

    def delete(self, step: int) -> None:
        """Delete files that are too old after this step's file was written. Ignore errors."""
        last = step - self.keep
        if self.keep <= 0:
            return
        due = [self.folder / f"step-{last}.jsonl"]
        if self._first:
            # A killed run, or one with a larger `keep`, may have left more. Listing a large folder
            # at every step would be slow.
            self._first = False
            with suppress(OSError), os.scandir(self.folder) as entries:
                found = [(_FILE.fullmatch(entry.name), Path(entry.path)) for entry in entries]
                due = [path for match, path in found if match and int(match[1]) <= last]
        for path in due:
            with suppress(OSError):
                path.unlink()


def write_rollouts(
    folder: Path,
    step: int,
    samples: Sequence[Sample],
    decode: Callable[[list[int]], str],
    grade: Callable[[str, str], bool | float | None],
    texts: TokenTexts | None = None,
) -> Path:
    """Write `<folder>/step-N.jsonl` atomically and return its path.

    `answer` is the prompt's gold answer and `correct` the grade of the response; both are null if
    there is nothing to grade. Log-probs and advantages have 7 significant digits, the precision of
    fp32; log-probs in `teacher_top` have 4. A value that is not finite is null, because JSON cannot
    express it. Values that a sample's `inspection` does not have are null too.

    Args:
        samples: in the order of the step's prompts. They are written by prompt, in the order in
            which the prompts first appear, and then by sample index.
        decode: returns the text of response token ids.
        grade: called with the response's text and the gold answer, if there is one. Returns whether
            it is right, or a score from 0 to 1, or None if it cannot be graded.
        texts: returns the texts of single tokens. None makes `response_pieces` and `teacher_top`
            null.
    """
    position: dict[int, int] = {}
    for sample in samples:
        position.setdefault(sample.prompt.index, len(position))
    ordered = sorted(samples, key=lambda s: (position[s.prompt.index], s.sample_index))
    path = folder / f"step-{step}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(json_line(_row(step, s, decode, grade, texts)) for s in ordered)
    os.replace(part, path)
    return path


def json_line(row: dict[str, Any]) -> str:
    """Return one line of a JSONL file.

    Write it as UTF-8 with errors="backslashreplace": a lone surrogate, which UTF-8 cannot encode,
    becomes its JSON escape.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return line.translate(_LINE_BREAKS) + "\n"


def _row(
    step: int,
    sample: Sample,
    decode: Callable[[list[int]], str],
    grade: Callable[[str, str], bool | float | None],
    texts: TokenTexts | None,
) -> dict[str, Any]:
    prompt, response = sample.prompt, decode(sample.response_ids)
    graded = after_prompt(prompt.text, response)
    return {
        "step": step,
        "prompt_index": prompt.index,
        "sample_index": sample.sample_index,
        "prompt": prompt.text,
        "response": response,
        "prompt_tokens": list(prompt.token_ids),
        "response_tokens": list(sample.response_ids),
        "student_logprobs": _rounded(sample.student_logprobs),
        "teacher_logprobs": _rounded(sample.teacher_logprobs),
        "reference_logprobs": _rounded(sample.reference_logprobs),
        "advantages": _rounded(sample.advantages),
        "finish_reason": sample.finish_reason,
        "answer": prompt.answer,
        "correct": None if prompt.answer is None else grade(graded, prompt.answer),
        "data_set": prompt.data_set or None,
        "response_pieces": None if texts is None else texts.pieces(sample.response_ids),
        **_inspected(sample.inspection or {}, texts),
    }


def _inspected(found: Mapping[str, TokenRanks], texts: TokenTexts | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for role in ("student", "teacher", "reference"):
        ranks = found[role].ranks.tolist() if role in found else None
        row[f"{role}_ranks"] = ranks and [rank or None for rank in ranks]
    row["teacher_top"] = None
    if texts is not None and "teacher" in found:
        teacher = found["teacher"]
        row["teacher_top"] = [
            [list(pair) for pair in zip(map(texts.alone, ids), _rounded(logprobs, 4), strict=True)]
            for ids, logprobs in zip(teacher.ids.tolist(), teacher.logprobs, strict=True)
        ]
    return row


def _rounded(values: Tensor | Sequence[float] | None, digits: int = 7) -> Any:
    """Return the values with this many significant digits, None where they are not finite."""
    if values is None:
        return None
    numbers = torch.as_tensor(values).tolist()
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in numbers]


def repetition(text: str) -> float:
    """Return the repetitiveness of a text, from 0 to 1: 1 - compressed size / size under zlib.

    Ordinary prose of a few hundred characters has about 0.3 to 0.5, a loop over 0.9, and a text
    that is too short to compress 0. When on-policy distillation collapses, the mean rises together
    with truncation (StableOPD, arXiv 2604.08527).
    """
    raw = text.encode("utf-8", errors="backslashreplace")
    if not raw:
        return 0.0
    return max(0.0, 1.0 - len(zlib.compress(raw)) / len(raw))
