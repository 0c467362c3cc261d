"""Load the tokenizer, and check that it fits its model and the other models' tokenizers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from opd_titan.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a local folder, without running code from the folder.

    Args:
        where: the key that errors name.

    Raises:
        ModelError: the tokenizer is missing or broken.
    """
    # Without this file transformers 5 silently builds an empty tokenizer from the model's type.
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{where}: the folder {str(folder)!r} has no tokenizer.json")
    from transformers import AutoTokenizer

    try:
        # If this were unset, transformers would ask a question on stdin.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise nearly every class here
        raise ModelError(
            f"{where}: the tokenizer in {str(folder)!r} cannot be read ({first_line(error)}); "
            "tokenizer.json and tokenizer_config.json must be complete, and need no code of their "
            "own"
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
            f"is {vocab_size}; the tokenizer belongs to a different model"
        )


def compare_tokenizers(
    student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str = "teacher"
) -> None:
    """Raise ModelError unless both map every token, special ones included, to the same id.

    The other model, named by its `role`, scores the student's token ids, so the maps must be equal.
    The token that ends a response may differ: see `eos_warning`.
    """
    student_ids, other_ids = student.get_vocab(), other.get_vocab()
    if student_ids == other_ids:
        return
    moved = sorted(t for t in student_ids.keys() & other_ids if student_ids[t] != other_ids[t])
    parts = []
    if moved:
        token = moved[0]
        parts.append(
            f"{len(moved)} tokens have different ids ({token!r}: student {student_ids[token]}, "
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
    """Return a warning if student and teacher end with different tokens, else None."""
    if set(student_eos) == set(teacher_eos):
        return None

    def show(ids: Collection[int]) -> str:
        names = (f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in sorted(ids))
        return ", ".join(names) or "no token"

    return (
        f"student ends with {show(student_eos)}, teacher ends with {show(teacher_eos)}; a response "
        "stops only at the student's; if the teacher would end with a different token, the "
        "student learns to write that token and to continue, up to rollout.max_new_tokens"
    )
