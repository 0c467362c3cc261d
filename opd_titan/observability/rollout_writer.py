"""What the student wrote, for people and scripts to read: one JSON object a line."""

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
from opd_titan.data.types import Sample, Standing
from opd_titan.grading.answers import after_prompt

# Legal inside JSON strings, but `str.splitlines` takes them for the end of a line.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}

_FILE = re.compile(r"step-(0|[1-9][0-9]*)\.jsonl")


class OldRollouts:
    """Deletes the rollouts of steps that are too old, and no other file.

    Those of later steps stay: a run that goes back replaces them as it comes by.

    Args:
        keep: steps whose files stay, counted back from the one that has just been written; 0 all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._swept = False

    def delete(self, step: int) -> None:
        """Call when a step's file is in place. A file that cannot be deleted is left."""
        last = step - self.keep
        if self.keep <= 0:
            return
        if self._swept:
            _delete(self.folder / f"step-{last}.jsonl")
            return
        # Only once: other steps than the oldest are due after a start with another `keep`, or when
        # the run before was killed.
        self._swept = True
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                found = _FILE.fullmatch(entry.name)
                if found and int(found[1]) <= last:
                    _delete(Path(entry.path))


def _delete(path: Path) -> None:
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
    """Write `<folder>/step-N.jsonl`, and return its path; the file appears whole or not at all.

    `answer` is the prompt's gold answer and `correct` the grade of the response against it, both
    null when there is nothing to grade. Log-probs and advantages keep 7 significant digits (what
    fp32 holds), those of `teacher_top` 4; a value that is not finite is null, since JSON has no
    word for it. What a sample's `inspection` lacks is null too.

    Args:
        samples: in the order of the step's prompts; prompts count in the order they first appear,
            and the samples of each by their index.
        decode: response token ids to text.
        grade: (response text, gold answer) to whether it is right, or a score from 0 to 1, or None
            where it cannot say; called only with an answer.
        texts: of single tokens; without them `response_pieces` and `teacher_top` are null.
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
    """One line of a JSONL file, whatever text it holds. To be written as UTF-8, with errors
    "backslashreplace": a lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
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
        "student_logprobs": _short(sample.student_logprobs),
        "teacher_logprobs": _short(sample.teacher_logprobs),
        "reference_logprobs": _short(sample.reference_logprobs),
        "advantages": _short(sample.advantages),
        "finish_reason": sample.finish_reason,
        "answer": prompt.answer,
        "correct": None if prompt.answer is None else grade(graded, prompt.answer),
        "data_set": prompt.data_set or None,
        "response_pieces": None if texts is None else texts.pieces(sample.response_ids),
        **_inspected(sample.inspection or {}, texts),
    }


def _inspected(found: Mapping[str, Standing], texts: TokenTexts | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for role in ("student", "teacher", "reference"):
        ranks = found[role].ranks.tolist() if role in found else None
        row[f"{role}_ranks"] = ranks and [rank or None for rank in ranks]
    row["teacher_top"] = None
    if texts is not None and "teacher" in found:
        teacher = found["teacher"]
        rows = zip(teacher.ids.tolist(), teacher.logprobs.tolist(), strict=True)
        row["teacher_top"] = [
            [[texts.alone(i), _rounded(v, 4)] for i, v in zip(ids, logprobs, strict=True)]
            for ids, logprobs in rows
        ]
    return row


def _short(values: Tensor | Sequence[float] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [_rounded(v, 7) for v in torch.as_tensor(values).tolist()]


def _rounded(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def repetition(text: str) -> float:
    """How repetitive a text is: 1 - compressed size / size under zlib, between 0 and 1.

    Ordinary prose of a few hundred characters gives about 0.3 to 0.5, a loop over 0.9; texts too
    short to compress give 0. A rising mean together with truncation is how on-policy distillation
    collapses (StableOPD, arXiv 2604.08527).
    """
    raw = text.encode("utf-8", errors="backslashreplace")
    if not raw:
        return 0.0
    return max(0.0, 1.0 - len(zlib.compress(raw)) / len(raw))
