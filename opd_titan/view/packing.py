"""Rollouts as blocks of base64, which a page can hold as they are and decode one at a time.

A block is compressed JSON. Base64 has no character that means anything in HTML.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_titan.view.rollouts import ROLES, Rollout

# Tokens of a chunk. A click decodes one: more would be felt, fewer would compress worse.
_CHUNK_TOKENS = 8_000
_PREVIEW = 110
# Log-probs and advantages are whole numbers of these; nobody reads finer.
_UNITS_PER_NAT = 1000


def block(value: Any) -> str:
    """The value as compressed JSON in base64."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


class _Words(dict[str, int]):
    """Strings, each of them once, and their places."""

    def __missing__(self, text: str) -> int:
        self[text] = place = len(self)
        return place


@dataclass
class Packed:
    """What a page holds of the rollouts.

    Attributes:
        index: a column of each of the list's values, of all rollouts.
        chunks: blocks of the rollouts themselves; the index says which one is where.
        texts: block of all prompts and responses, to search in.
    """

    index: dict[str, Any]
    chunks: list[str]
    texts: str
    count: int
    steps: list[int]


def pack(rollouts: Iterable[Rollout]) -> Packed:
    """Pack rollouts in this order; no more than a chunk of them is in memory at once."""
    packer = _Packer()
    for rollout in rollouts:
        packer.add(rollout)
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

    def add(self, r: Rollout) -> None:
        # A number may be another prompt's where the data have changed meanwhile.
        question = self.questions.setdefault((r.prompt_index, r.prompt), len(self.questions))
        if question == len(self.sets):
            self.sets.append(r.data_set or "")
        kl = r.kl
        values = {
            "step": r.step,
            "prompt": r.prompt_index,
            "sample": r.sample_index,
            "question": question,
            "kl": None if kl is None else float(f"{kl:.4g}"),
            "tokens": len(r.tokens),
            "cut": int(r.finish_reason == "length"),
            "correct": None if r.correct is None else float(f"{r.correct:.4g}"),
            "preview": _preview(r.response),
            "chunk": len(self.chunks),
            "place": len(self.rows),
        }
        for name, value in values.items():
            self.columns[name].append(value)
        self.responses.append(r.response)
        self.rows.append(_row(r, self.words))
        self.tokens += len(r.tokens)
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


def _row(r: Rollout, words: _Words) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": words[r.prompt],
        "finish": words[r.finish_reason],
        "answer": None if r.answer is None else words[r.answer],
        "advantages": _whole(r.advantages, _UNITS_PER_NAT),
    }
    if r.pieces is None:
        row |= {"response": words[r.response], "ids": r.tokens}
    else:
        row["pieces"] = list(map(words.__getitem__, r.pieces))
    for role in ROLES:
        row[role] = _whole(r.logprobs.get(role), _UNITS_PER_NAT)
        row[f"{role}_ranks"] = _whole(r.ranks.get(role), 1)
    if r.top_texts is not None:
        row["top_sizes"] = r.top_sizes
        row["top"] = list(map(words.__getitem__, r.top_texts))
        row["top_logprobs"] = _whole(r.top_logprobs, _UNITS_PER_NAT)
    return row


def _whole(values: np.ndarray | None, units: int) -> list[int | None] | None:
    """Rounded to whole numbers of a unit's part; NaN is null."""
    if values is None:
        return None
    unknown = np.isnan(values)
    rounded = np.rint(np.where(unknown, 0.0, values) * units).astype(np.int64).tolist()
    if unknown.any():
        return [None if odd else v for v, odd in zip(rounded, unknown.tolist(), strict=True)]
    return rounded


def _preview(text: str) -> str:
    return " ".join(text[: 4 * _PREVIEW].split())[:_PREVIEW]


def _common_start(prompts: list[str]) -> int:
    """Length of what all prompts start with, in whole words: a list should show what differs."""
    start = os.path.commonprefix(prompts) if len(prompts) > 1 else ""
    while start and not start[-1].isspace():
        start = start[:-1]
    return len(start)
