"""A character-level tokenizer, and a check of one-line errors."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_titan.errors import UserError

CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if not enable_thinking %}()" + "{% endif %}{% endif %}"
)


def tiny_tokenizer(extra: tuple[str, ...] = (), chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, so that a text's length is its token count."""
    characters = [chr(c) for c in range(32, 127)] + ["\n", *extra]
    vocab = {"<unk>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(characters)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", name_or_path="tiny"
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 700, message
    for part in parts:
        assert re.search(part, message), f"{part!r} not in: {message}"
