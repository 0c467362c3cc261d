"""Find the final answer in a response and compare it with the gold answer, exactly.

Where a response commits itself is looked for in the customary order: what follows `</think>` only;
a number after the last `####` (GSM8K's own form); the last `\\boxed{}`; "the answer is ..."; the
last number of all. Numbers compare as fractions, so 70, 70.0, $70 and 1,000 mean what they say.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIGN = r"(?:(?<![\w).])[-+])?"
# Commas part thousands (in India also hundreds of them): "1,2" and "12,34" are two numbers.
WHOLE = r"(?:\d{1,3}(?:,\d{2,3}){0,9},\d{3}(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"{_SIGN}(?:\d+ +\d+/\d+|(?:{WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}\b)?(?:/\d+)?)"
)
# Words that are no unit, but change the number before them.
_MATHS = r"(?:pi|\u03c0|[ikxyz]|sqrt|sin|cos|tan|log|ln|mod|or|and)(?![^\W\d_])"
# What may stand behind a number without changing it: %, a degree sign, a unit of two letters or
# more ("5km"), or words after a space ("5 apples", "5 m"), perhaps squared. Not "5x", "5 pi",
# "5 + x" or "5, 6".
_WORD = rf"(?!{_MATHS})[^\W\d_]"
_UNIT = (
    rf"(?:%|\u00b0[CF]?|{_WORD}[^\W\d_]+|\s+{_WORD}[^\W\d_]*)"
    rf"(?:[\s.'/-]+{_WORD}[^\W\d_]*)*(?:\s*\^\s*(?:[23]|\{{[23]\}}))?"
)
# What shows that the number before it is but a part of the answer.
_GOES_ON = re.compile(
    r"\s*(?:\^|\\(?:pi|sqrt|times|cdot)|[\u03c0\u221a]|[*\u00d7+]\s*\d|[xyz](?!\w))|,\d"
)
_POWER_OF_TEN = re.compile(
    r"(?<=\d)\s*(?:\\times|\\cdot|[\u00d7x*])\s*10\s*\^\s*(?:\{([-+]?\d{1,3})\}|([-+]?\d{1,3}))"
)
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
# Thousands parted by spaces.
_SPACED = re.compile(r"(?<![\d.,/])\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?![\d/])")
# Between two "=": more than one value.
_SEVERAL = re.compile(r",\s*[^\W\d_]|,\s|;|\bor\b|\band\b", re.IGNORECASE)
_QUANTITY = re.compile(rf"({_NUMBER.pattern})\.?\s*(?:{_UNIT})?\.?")
_PHRASE = re.compile(
    r"\banswer\s*(?:is|was|:|=|equals|would be)(.*?)(?:[.!?](?=\s)|\n|$)", re.IGNORECASE
)
_BOXED = re.compile(r"\\[{}]|\\f?boxed\s*\{|[{}]")
# Digits that a model may repeat without end are no answer, and slow to convert.
_MAX_DIGITS = 200
_LONGEST = 2000


def after_prompt(prompt: str, response: str) -> str:
    """The response, with the `<think>` that its prompt may have opened for it.

    The templates of DeepSeek-R1 and Qwen3-Thinking do; a response that was cut off then shows no
    sign of it.
    """
    return "<think>" + response if prompt.rstrip().endswith("<think>") else response


def without_thinking(response: str) -> str | None:
    """What follows the last `</think>`; None if the thinking never ends."""
    if "</think>" in response:
        return response[response.rindex("</think>") + len("</think>") :]
    return None if "<think>" in response else response


def extract_answer(text: str, numeric: bool = True) -> str | None:
    """Return the final answer that a response gives, None if it gives none.

    A response that opens `<think>` and never closes it was cut off before its answer. With
    `numeric` off (the gold answer is text) an answer may be words, or a response of one line as it
    stands, but never just the last number.
    """
    after = without_thinking(text)
    if after is None:
        return None
    text = after
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
    if not numeric:
        line = text.strip()
        return line if line and "\n" not in line else None
    numbers = _NUMBER.findall(_plain(text))
    return numbers[-1] if numbers else None


def normalize_number(text: str) -> Fraction | None:
    """Read text that is one number, perhaps with a currency sign or a unit; None if it is not.

    Understands signs, thousands commas, decimals, exponents, "1/2", "3 1/2" and LaTeX fractions.
    """
    if len(text) > _LONGEST:
        return None
    before, _, plain = _plain(text).rpartition("=")
    if "=" in before and _SEVERAL.search(before, before.index("=")):
        return None
    plain = re.sub(r"^([-+])\s+", r"\1", plain.strip(" :()").rstrip(". "))
    match = _QUANTITY.fullmatch(_SPACED.sub(lambda m: re.sub(r"\s", "", m[0]), plain))
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


def same_answer(answer: str, gold: str) -> bool:
    """Two numbers must be equal; anything else must be the same text, case and spaces aside."""
    number = normalize_number(gold)
    if number is not None:
        return normalize_number(answer) == number
    return _bare(answer) == _bare(gold)


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}` whose braces balance; None where there is none."""
    return _last_boxed(text)[0]


def _answer_in(line: str, numeric: bool) -> str | None:
    """The answer in the line or phrase that announces it: after an "=", else the first number.

    Where more than a number is announced ("5x", "10^5", "(2, 3)"), all of it.
    """
    plain = _plain(line)
    if not numeric:
        return plain.strip(" :.") or None
    match = _NUMBER.search(plain, plain.rfind("=") + 1) or _NUMBER.search(plain)
    if match is None:
        return None
    before, after = plain[: match.start()].rstrip(), plain[match.end() :]
    if _GOES_ON.match(after) or (before.endswith(("(", "[")) and after.lstrip().startswith(",")):
        return plain.strip()
    sign = "-" if before.endswith("-") and before[:-1].rstrip()[-1:] in ("", "=", ":") else ""
    return sign + match[0]


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
                # One around another has that one's content; an empty one is talk of the form.
                if is_box and start > at and text[inside : match.start()].strip():
                    found, at = text[inside : match.start()].strip(), start
        elif token not in ("\\{", "\\}"):
            opened.append((match.start(), match.end(), token != "{"))
    return found, at


def _plain(text: str) -> str:
    """Strip LaTeX, Markdown and currency from around numbers."""
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("**", "").replace("`", "")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=\d)\s*(?=\\[cdt]?frac)", " ", text)
    text = _FRACTION.sub(_as_ratio, text)
    text = text.replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "\u00b0", text)
    text = _POWER_OF_TEN.sub(r"e\1\2", text)
    text = re.sub(r"\\[,;:! ]|\\\(|\\\)|\\\[|\\\]", "", text)
    return re.sub(r"\\?[$\u20ac\u00a3]", "", text)


def _as_ratio(found: re.Match[str]) -> str:
    above, above_digit, below, below_digit = found.groups()
    ratio = f"{above_digit or above}/{below_digit or below}"
    return ratio + " " if found.string[found.end() : found.end() + 1].isdigit() else ratio


def _bare(text: str) -> str:
    return " ".join(_plain(text).split()).casefold().strip(" .()")
