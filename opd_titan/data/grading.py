"""Find the final answer in a response and compare it with the gold answer, exactly.

Where a response commits itself is looked for in the customary order: what follows `</think>` only;
a number after the last `####` (GSM8K's own form); the last `\\boxed{}`; "the answer is ..."; the
last number of all. Numbers compare as fractions, so 70, 70.0, $70 and 1,000 mean what they say.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIGN = r"(?:(?<![\w).])[-+])?"
_NUMBER = re.compile(
    rf"{_SIGN}(?:\d+ +\d+/\d+|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}\b)?(?:/\d+)?)"
)
# What may stand behind a number without changing it: %, a degree sign, a unit of two letters or
# more ("5km"), or words after a space ("5 apples", "5 m"). Not "5x", "5 + x" or "5, 6".
_UNIT = r"(?:%|\u00b0[CF]?|[^\W\d_]{2,}|\s+[^\W\d_]+)(?:[\s.'/-]+[^\W\d_]+)*"
_QUANTITY = re.compile(rf"({_NUMBER.pattern})\.?\s*(?:{_UNIT})?\.?")
_PHRASE = re.compile(
    r"\banswer\s*(?:is|was|:|=|equals|would be)(.*?)(?:[.!?](?=\s)|\n|$)", re.IGNORECASE
)
_BOXED = re.compile(r"\\[{}]|\\f?boxed\s*\{|[{}]")
# Digits that a model may repeat without end are no answer, and slow to convert.
_MAX_DIGITS = 200


def extract_answer(text: str, numeric: bool = True) -> str | None:
    """Return the final answer that a response gives, None if it gives none.

    A response that opens `<think>` and never closes it was cut off before its answer. With
    `numeric` off (the gold answer is text) an answer may be words, but never just the last number.
    """
    if "</think>" in text:
        text = text[text.rindex("</think>") + len("</think>") :]
    elif "<think>" in text:
        return None

    boxed, boxed_at = _last_boxed(text)
    marker = text.rfind("####")
    # "####" can also be a Markdown heading, so a box below it has the last word.
    if marker > boxed_at:
        rest = text[marker:].lstrip("# :\n")
        found = _answer_in(rest.split("\n", 1)[0], numeric)
        if found is not None:
            return found
    if boxed is not None:
        return boxed
    phrases = _PHRASE.findall(_plain(text))
    if phrases:
        found = _answer_in(phrases[-1], numeric)
        if found is not None:
            return found
    numbers = _NUMBER.findall(_plain(text)) if numeric else []
    return numbers[-1].rstrip(",") if numbers else None


def normalize_number(text: str) -> Fraction | None:
    """Read text that is one number, perhaps with a currency sign or a unit; None if it is not.

    Understands signs, thousands commas, decimals, exponents, "1/2", "3 1/2" and LaTeX fractions.
    """
    plain = _plain(text).rsplit("=", 1)[-1].strip(" :()").rstrip(". ")
    match = _QUANTITY.fullmatch(plain)
    if match is None or len(match[1]) > _MAX_DIGITS:
        return None
    number = match[1].replace(",", "")
    whole, _, part = number.rpartition(" ")
    try:
        if not whole:
            return Fraction(number)
        sign = -1 if whole.startswith("-") else 1
        return Fraction(whole) + sign * Fraction(part)
    except (ValueError, ZeroDivisionError):
        return None


def grade(response: str, gold: str | None) -> bool | None:
    """Return whether the response's final answer is the gold one; None when there is no gold.

    Two numbers must be equal; anything else must be the same text, case and spaces aside.
    """
    if gold is None:
        return None
    gold_number = normalize_number(gold)
    answer = extract_answer(response, numeric=gold_number is not None)
    if answer is None:
        return False
    if gold_number is not None:
        return normalize_number(answer) == gold_number
    return _bare(answer) == _bare(gold)


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}` whose braces balance; None where there is none."""
    return _last_boxed(text)[0]


def _answer_in(line: str, numeric: bool) -> str | None:
    """The answer in the line or phrase that announces it: after an "=", else the first number."""
    plain = _plain(line)
    if not numeric:
        return plain.strip(" :.") or None
    match = _NUMBER.search(plain, plain.rfind("=") + 1) or _NUMBER.search(plain)
    return match[0].rstrip(",") if match else None


def _last_boxed(text: str) -> tuple[str | None, int]:
    """Return the content of the last `\\boxed{}` whose braces balance and its place, or None, -1.

    One pass with a stack: a degenerate response may open thousands of boxes.
    """
    found, at = None, -1
    opened: list[tuple[int, int, bool]] = []
    for match in _BOXED.finditer(text):
        token = match[0]
        if token == "}":
            if opened:
                start, inside, is_box = opened.pop()
                if is_box:
                    found, at = text[inside : match.start()].strip(), start
        elif token not in ("\\{", "\\}"):
            opened.append((match.start(), match.end(), token != "{"))
    return found, at


def _plain(text: str) -> str:
    """Strip LaTeX, Markdown and currency from around numbers."""
    text = text.replace("\u2212", "-").replace("**", "").replace("`", "")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace("\\%", "%").replace("^\\circ", "\u00b0")
    text = re.sub(r"\\[,;:! ]|\\\(|\\\)|\\\[|\\\]", "", text)
    return re.sub(r"\\?[$\u20ac\u00a3]", "", text)


def _bare(text: str) -> str:
    return " ".join(_plain(text).split()).casefold().strip(" .()")
