"""Pack rollouts into blocks of base64, which the page decodes one at a time.

A block is compressed JSON. Base64 has no character that is special in HTML.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_titan.view.rollouts import read_lines

# Tokens per chunk. A click decodes one chunk. A larger chunk would be slow, and a smaller one would
# compress worse.
_CHUNK_TOKENS = 8_000
_PREVIEW = 110
# Log-probs and advantages are stored as integers in this unit, the precision that the page shows.
_UNITS_PER_NAT = 1000
ROLES = ("student", "teacher", "reference")
_MAX_NUMBER = 1e12  # larger than every log-prob, advantage and rank


def block(value: Any) -> str:
    """Return the value as compressed JSON in base64."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


class _Words(dict[str, int]):
    """Distinct strings and their positions."""

    def __missing__(self, text: str) -> int:
        self[text] = place = len(self)
        return place


@dataclass
class Packed:
    """The rollouts of a page.

    Attributes:
        index: the columns of the page's list, with one entry per rollout.
        chunks: blocks of the rollouts themselves; the index has the chunk of each rollout.
        texts: block of all prompts and responses, for searching.
    """

    index: dict[str, Any]
    chunks: list[str]
    texts: str
    count: int
    steps: list[int]


def pack(files: Iterable[Path]) -> Packed:
    """Pack the rollouts of these files in order, with one chunk in memory at a time.

    Raises:
        DataError: names a line that is not a rollout.
    """
    packer = _Packer()
    for path in files:
        read_lines(path, packer.add)
    return packer.finish()


_COLUMNS = "step prompt sample question kl tokens cut correct preview chunk place".split()


@dataclass
class _Packer:
    columns: dict[str, list[Any]] = field(default_factory=lambda: {c: [] for c in _COLUMNS})
    chunks: list[str] = field(default_factory=list)
    questions: dict[tuple[int, str], int] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    words: _Words = field(default_factory=_Words)
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0

    def add(self, line: bytes) -> None:
        """Add a line of a rollout file. `read_lines` reports the errors of a damaged line."""
        row = json.loads(line.decode())
        if not isinstance(row, dict):
            raise TypeError("no JSON object")
        packed, kl = _packed(row, self.words)
        # If the data changed between two starts of the run, an index may have several prompts.
        key = (row["prompt_index"], row["prompt"])
        question = self.questions.setdefault(key, len(self.questions))
        if question == len(self.sets):
            self.sets.append(row.get("data_set") or "")
        correct = row["correct"]
        values = {
            "step": int(row["step"]),
            "prompt": row["prompt_index"],
            "sample": row["sample_index"],
            "question": question,
            "kl": kl,
            "tokens": len(row["response_tokens"]),
            "cut": int(row["finish_reason"] == "length"),
            "correct": None if correct is None else float(f"{correct:.4g}"),
            "preview": _preview(row["response"]),
            "chunk": len(self.chunks),
            "place": len(self.rows),
        }
        for name, value in values.items():
            self.columns[name].append(value)
        self.responses.append(row["response"])
        self.rows.append(packed)
        self.tokens += len(row["response_tokens"])
        if self.tokens >= _CHUNK_TOKENS:
            self._close_chunk()

    def _close_chunk(self) -> None:
        if self.rows:
            self.chunks.append(block({"words": list(self.words), "rows": self.rows}))
        self.words, self.rows, self.tokens = _Words(), [], 0

    def finish(self) -> Packed:
        self._close_chunk()
        prompts = [prompt for _, prompt in self.questions]
        before = _common_start(prompts)
        steps = sorted(set(self.columns["step"]))
        self.columns["questions"] = [_preview(prompt[before:]) for prompt in prompts]
        self.columns["sets"] = self.sets
        texts = {"prompts": prompts, "responses": self.responses}
        return Packed(self.columns, self.chunks, block(texts), len(self.responses), steps)


def _packed(row: dict[str, Any], words: _Words) -> tuple[dict[str, Any], float | None]:
    """Return the rollout as the page's script reads it, and its mean log S - log T."""
    count = len(row["response_tokens"])
    logprobs = {r: _numbers(row, f"{r}_logprobs", count) for r in ROLES}
    packed: dict[str, Any] = {
        "prompt": words[row["prompt"]],
        "finish": words[row["finish_reason"]],
        "answer": None if row["answer"] is None else words[row["answer"]],
        "advantages": _integers(_numbers(row, "advantages", count), _UNITS_PER_NAT),
    }
    for role in ROLES:
        packed[role] = _integers(logprobs[role], _UNITS_PER_NAT)
        packed[f"{role}_ranks"] = _integers(_numbers(row, f"{role}_ranks", count), 1)
    pieces, top = _values(row, "response_pieces", count), _values(row, "teacher_top", count)
    if pieces is None:  # a file of an earlier version
        packed |= {"response": words[row["response"]], "ids": row["response_tokens"]}
    else:
        packed["pieces"] = [words[piece] for piece in pieces]
    if top is not None:
        pairs = [(text, value) for alternatives in top for text, value in alternatives]
        packed["top_sizes"] = [len(alternatives) for alternatives in top]
        packed["top"] = [words[text] for text, _ in pairs]
        packed["top_logprobs"] = _integers(_array([value for _, value in pairs]), _UNITS_PER_NAT)
    if logprobs["student"] is None or logprobs["teacher"] is None:
        return packed, None
    gaps = logprobs["student"] - logprobs["teacher"]
    gaps = gaps[~np.isnan(gaps)]
    return packed, float(f"{gaps.mean():.4g}") if gaps.size else None


def _values(row: dict[str, Any], key: str, count: int) -> list[Any] | None:
    """Return the per-token values of a key; None if they are null or missing."""
    values = row.get(key)
    if values is not None and len(values) != count:
        raise ValueError(f"`{key}` has {len(values)} entries for {count} tokens")
    return values


def _numbers(row: dict[str, Any], key: str, count: int) -> np.ndarray | None:
    values = _values(row, key, count)
    return None if values is None else _array(values)


def _array(values: list[float | None]) -> np.ndarray:
    """Return fp64, with NaN for null and for impossible values."""
    array = np.array(values, dtype=np.float64)
    return np.where(np.abs(array) < _MAX_NUMBER, array, np.nan)


def _integers(values: np.ndarray | None, units: int) -> list[int | None] | None:
    """Round to multiples of 1 / units; NaN becomes None."""
    if values is None:
        return None
    unknown = np.isnan(values)
    rounded = np.rint(np.where(unknown, 0.0, values) * units).astype(np.int64).tolist()
    if unknown.any():
        return [None if bad else v for v, bad in zip(rounded, unknown.tolist(), strict=True)]
    return rounded


def _preview(text: str) -> str:
    return " ".join(text[: 4 * _PREVIEW].split())[:_PREVIEW]


def _common_start(prompts: list[str]) -> int:
    """Return the length of the whole words that all prompts begin with; the list omits them."""
    start = os.path.commonprefix(prompts) if len(prompts) > 1 else ""
    while start and not start[-1].isspace():
        start = start[:-1]
    return len(start)
