"""The text of each token of a response, for display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # decoders write it for bytes that are not UTF-8
# A character has at most 4 bytes in UTF-8, so a text may end with up to 3 incomplete bytes.
_MAX_INCOMPLETE = 3
# A token is decoded together with this many earlier tokens, so that a character that is cut off at
# their start is never mistaken for an incomplete one at their end.
_CONTEXT = 16


class TokenTexts:
    """Split a decoded text into the parts of its tokens. Special tokens are shown by name."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; joined, they are the decoded text with special tokens.

        If a character has several tokens, it belongs to the last one, and the others are empty.
        """
        alone = [self._decoded(i) for i in ids]
        if _BROKEN not in "".join(alone) and "".join(alone) == self._decode(ids):
            return alone
        # Some tokens are parts of characters, or their text depends on their neighbours. So the
        # text of a token is its addition to the decoded text, without an incomplete end.
        pieces = []
        for t in range(len(ids)):
            start, last = max(0, t - _CONTEXT), t == len(ids) - 1
            before = _complete(self._decode(ids[start:t]))
            text = self._decode(ids[start : t + 1])
            pieces.append((text if last else _complete(text))[len(before) :])
        return pieces

    def alone(self, token: int) -> str:
        """Return the text of one token, or its name in the vocabulary for part of a character."""
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


def _complete(text: str) -> str:
    """Return the text without the characters at its end that the next token may complete."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    return text[: len(text) - min(broken, _MAX_INCOMPLETE)]
