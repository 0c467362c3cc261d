"""The tokenizer, and whether it fits the model and the other model's tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from opd_titan.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a local folder. No code from the folder is ever run.

    Raises ModelError, naming the key `where`, for one that is missing or broken.
    """
    # Without this file transformers 5 quietly builds an empty tokenizer from the model's type.
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{where}: the folder {str(folder)!r} has no tokenizer.json")
    from transformers import AutoTokenizer

    try:
        # False, not unset: unset would ask a question on stdin.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise nearly every class here
        raise ModelError(
            f"{where}: the tokenizer in {str(folder)!r} cannot be read ({first_line(error)}); "
            "tokenizer.json and tokenizer_config.json must be whole and need no code of their own"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{where}: {str(folder)!r} has no fast tokenizer; save a tokenizer.json")
    return tokenizer


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
