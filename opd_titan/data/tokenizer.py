"""The tokenizer, and whether it fits the model and the other model's tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from opd_titan.data.files import first_line
from opd_titan.data.loading import looks_like_hub_id
from opd_titan.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path_or_id: str, where: str = "student.hf_path") -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a local folder or a hub id. No code from the folder is ever run.

    Raises ModelError, naming the key `where`, for one that is missing, broken or unreachable.
    """
    _require_tokenizer_json(path_or_id, where)
    from transformers import AutoTokenizer

    folder = Path(path_or_id).expanduser()
    source = str(folder) if folder.is_dir() else path_or_id
    try:
        # False, not unset: unset would ask a question on stdin.
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise nearly every class here
        raise ModelError(
            f"{where}: the tokenizer in {path_or_id!r} cannot be read ({first_line(error)}); "
            "tokenizer.json and tokenizer_config.json must be whole and need no code of their own"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{where}: {path_or_id!r} has no fast tokenizer; save a tokenizer.json")
    return tokenizer


def _require_tokenizer_json(path_or_id: str, where: str) -> None:
    """Without this file transformers 5 quietly builds an empty tokenizer from the model's type."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{where}: the folder {path_or_id!r} has no tokenizer.json")
        return
    if not looks_like_hub_id(path_or_id):
        raise ModelError(
            f"{where} = {path_or_id!r} is neither a local folder nor a hub id such as "
            "'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(path_or_id, "tokenizer.json")
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{where} = {path_or_id!r} is no local folder and the hub has no such model (or it is "
            "private: log in first)"
        ) from error
    except Exception as error:
        missing = isinstance(error, EntryNotFoundError)
        if missing and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"{where}: {path_or_id!r} has no tokenizer.json") from error
        raise ModelError(
            f"{where} = {path_or_id!r} is no local folder and the hub cannot be reached "
            f"({type(error).__name__}); download the model and give the folder's path"
        ) from error


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raise ModelError unless every token id has a row in the model's embedding.

    The model may have more rows than the tokenizer has tokens (Qwen3: 151,936 and 151,669).
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise ModelError(
            f"{where}: the tokenizer's highest token id is {highest}, but the model's vocab_size "
            f"is {vocab_size}; the tokenizer belongs to another model"
        )


def compare_tokenizers(
    student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str = "teacher"
) -> None:
    """Raise ModelError unless both map every token, special ones included, to the same id.

    The other model, named by its `role`, scores the student's token ids, so equal maps are what
    distillation needs. Which token ends a response may differ: see `eos_warning`.
    """
    student_ids, other_ids = student.get_vocab(), other.get_vocab()
    if student_ids == other_ids:
        return
    moved = sorted(t for t in student_ids.keys() & other_ids if student_ids[t] != other_ids[t])
    parts = []
    if moved:
        token = moved[0]
        parts.append(
            f"{len(moved)} tokens have other ids ({token!r}: student {student_ids[token]}, "
            f"{role} {other_ids[token]})"
        )
    for name, mine, others in (("student", student_ids, other_ids), (role, other_ids, student_ids)):
        only = sorted(mine.keys() - others.keys(), key=mine.__getitem__)
        if only:
            example = f"{only[0]!r} = {mine[only[0]]}"
            parts.append(f"{len(only)} tokens are only in the {name} ({example})")
    raise ModelError(
        f"student.hf_path and {role}.hf_path: the vocabularies differ: "
        + "; ".join(parts)
        + "; both models must use the same tokenizer"
    )


def eos_warning(
    student_eos: Collection[int], teacher_eos: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Return what will happen when student and teacher end with different tokens, None if equal."""
    if set(student_eos) == set(teacher_eos):
        return None

    def show(ids: Collection[int]) -> str:
        names = (f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in sorted(ids))
        return ", ".join(names) or "no token"

    return (
        f"student ends with {show(student_eos)}, teacher ends with {show(teacher_eos)}; a response "
        "stops only at the student's, so where the teacher would end with another token the "
        "student learns to write that token and to go on, up to rollout.max_new_tokens"
    )
