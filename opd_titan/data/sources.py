"""The data sets that the program knows. A new one is one small function with `@dataset`.

The function turns one row into a `Record`, or raises `RowError` if the row cannot be used.
`loading.py` finds and reads the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

# The prompt of the prototype of this project, unchanged to the byte.
QUESTION_FORMAT = "Question: {}\nAnswer: Let's solve this step by step.\n"
# For sets in which each row already is a prompt.
TEXT_FORMAT = "{}"


class RowError(ValueError):
    """A row cannot be used. The caller adds its place and raises a `DataError`."""


@dataclass(frozen=True)
class Record:
    """The prompt of a row as turns and, if the row has them, a response and a gold answer.

    Attributes:
        messages: `{"role", "content"}` turns up to and including the last user turn.
    """

    messages: list[Message]
    response: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: its name on the hub, its columns, and how to read a row.

    Attributes:
        columns: the columns that a row must have; "a|b" means one of the two.
        raw_format: the text around the prompt in the raw template, with one `{}`.
        deduplicate: keep only the first row of each prompt (compared with whitespace normalised).
    """

    name: str
    to_record: Callable[[Mapping[str, Any]], Record]
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...] = ()
    hub_id: str = ""
    hub_config: str = ""
    raw_format: str = TEXT_FORMAT
    deduplicate: bool = False

    @property
    def all_columns(self) -> list[str]:
        """The names of all columns that `to_record` may see."""
        needed = [name for column in self.columns for name in column.split("|")]
        return [*needed, *self.optional_columns]


DATASETS: dict[str, DatasetSpec] = {}


def dataset(name: str, **spec: Any) -> Callable[[Callable], Callable]:
    """Register the decorated function under `name` in `DATASETS`."""

    def register(to_record: Callable) -> Callable:
        DATASETS[name] = DatasetSpec(name, to_record, **spec)
        return to_record

    return register


_GSM8K_ANSWER = re.compile(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")


@dataset(
    "gsm8k",
    columns=("question", "answer"),
    hub_id="openai/gsm8k",
    hub_config="main",
    raw_format=QUESTION_FORMAT,
)
def gsm8k(row: Mapping[str, Any]) -> Record:
    """Read `question`, and a worked `answer` that ends in `#### <number>`."""
    question, answer = _text(row, "question"), _text(row, "answer")
    golds = _GSM8K_ANSWER.findall(answer)
    if not golds:
        raise RowError("field 'answer' has no final number after '####'")
    return Record([_user(question)], response=answer, answer=golds[-1].replace(",", ""))


@dataset(
    "openthoughts3",
    columns=("conversations",),
    hub_id="open-thoughts/OpenThoughts3-1.2M",
    deduplicate=True,
)
def openthoughts3(row: Mapping[str, Any]) -> Record:
    """Read the first human turn as the prompt, and the gpt turn after it as the response.

    The set has about 16 traces per question and no gold answers. The gpt turn may contain the
    answer and is never part of the prompt.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowError(f"field 'conversations' is {_kind(turns)}, not a list of turns")
    prompt = response = None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise RowError(
                f"field 'conversations' contains {_kind(turn)}, not {{from, value}} turns"
            )
        role = turn.get("from")
        if role in ("human", "user") and prompt is None:
            prompt = _text(turn, "value", "conversations[].value")
        elif role in ("gpt", "assistant") and prompt is not None:
            response = _text(turn, "value", "conversations[].value")
            break
    if prompt is None:
        raise RowError("field 'conversations' has no turn from 'human' or 'user'")
    return Record([_user(prompt)], response=response)


@dataset("prompts", columns=("prompt|messages",), optional_columns=("response", "answer"))
def prompts(row: Mapping[str, Any]) -> Record:
    """Read any set with a `prompt` (text) or `messages` (turns) column; `prompt` takes precedence.

    The messages up to the last user turn are the prompt. A single assistant turn after it is the
    response, unless a `response` column has one. `prompt` may be a list of turns, too.
    """
    field = "prompt" if row.get("prompt") is not None else "messages"
    if row.get(field) is None:
        raise RowError(f"field '{'prompt' if 'prompt' in row else 'messages'}' is missing or null")
    response = None
    if isinstance(row[field], list):
        messages, response = _split_turns(row[field], field)
    else:
        messages = [_user(_text(row, field))]
    if row.get("response") is not None:
        response = _text(row, "response")
    return Record(messages, response, _answer(row.get("answer")))


def _split_turns(turns: list[Any], field: str) -> tuple[list[Message], str | None]:
    """Split turns into the prompt and the response, if exactly one assistant turn follows it."""
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise RowError(f"field '{field}' contains {_kind(turn)}, not {{role, content}} turns")
        role = _text(turn, "role", f"{field}[].role")
        messages.append({"role": role, "content": _text(turn, "content", f"{field}[].content")})
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last_user is None:
        raise RowError(f"field '{field}' has no turn with role 'user'")
    rest = messages[last_user + 1 :]
    is_response = len(rest) == 1 and rest[0]["role"] == "assistant"
    return messages[: last_user + 1], rest[0]["content"] if is_response else None


def _answer(value: Any) -> str | None:
    """Return a gold answer, which is text or a number; None if it is empty, absent or NaN."""
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"field 'answer' is {_kind(value)}, not text or a number")
    return repr(value) if value == value else None


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _text(row: Mapping[str, Any], field: str, shown: str | None = None) -> str:
    """Return `row[field]`, which must be text that is not blank."""
    value = row.get(field)
    shown = shown or field
    if value is None:
        raise RowError(f"field '{shown}' is missing or null")
    if not isinstance(value, str):
        raise RowError(f"field '{shown}' is {_kind(value)}, not text")
    if not value.strip():
        raise RowError(f"field '{shown}' is empty")
    return value


def _kind(value: Any) -> str:
    """Return the name of a value's type, in JSON's terms if it has one."""
    if value is None:
        return "missing or null"
    names: list[tuple[Any, str]] = [
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (Mapping, "an object"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
