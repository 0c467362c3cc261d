"""Text of single tokens, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoders write for bytes that are no UTF-8
# A character of UTF-8 has 4 bytes at most: up to 3 of them may wait for the next token.
_MOST_WAITING = 3
# Tokens before one that are decoded with it: so many that a character cut off at their start is
# never among those that wait, even if all of them are broken.
_CONTEXT = 16


class TokenTexts:
    """Which part of a text each token is. Special tokens are shown by their names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A text for each token; joined they are the decoded tokens, special ones included.

        A character that several tokens make up is the last one's, the others' text is empty.
        """
        alone = [self._decoded(i) for i in ids]
        if _BROKEN not in "".join(alone) and "".join(alone) == self._decode(ids):
            return alone
        # Tokens that are parts of characters, or whose text depends on their neighbours: each one
        # adds what the text so far gains by it. What ends in a broken character may still change.
        pieces = []
        for t in range(len(ids)):
            start, last = max(0, t - _CONTEXT), t == len(ids) - 1
            before = _settled(self._decode(ids[start:t]))
            text = self._decode(ids[start : t + 1])
            pieces.append((text if last else _settled(text))[len(before) :])
        return pieces

    def alone(self, token: int) -> str:
        """One token's own text; its name in the vocabulary where that is part of a character."""
        text = self._decoded(token)
        if _BROKEN in text:
            return str(self._tokenizer.convert_ids_to_tokens(int(token)) or text)
        return text

    def _decoded(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _settled(text: str) -> str:
    """Without what the next token may still complete."""
    waiting = len(text) - len(text.rstrip(_BROKEN))
    return text[: len(text) - min(waiting, _MOST_WAITING)]
