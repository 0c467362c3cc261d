"""Read a number as people and models write it: `$1,000`, `70.0`, `3 1/2`, `\\frac{1}{2}`, `5 km`.

Numbers are exact fractions, so 70, 70.0 and 140/2 are equal and 0.30000000000000004 is not 0.3.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Commas separate groups of three digits (in India also of two). "1,2" and "12,34" are two numbers.
WHOLE = r"(?:\d{1,3}(?:,\d{2,3}){0,9},\d{3}(?!\d)|\d+)"
# A sign, then a mixed number such as "3 1/2", or a decimal, perhaps with an exponent or a divisor.
NUMBER = re.compile(
    r"(?:(?<![\w).])[-+])?"
    rf"(?:\d+ +\d+/\d+|(?:{WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}\b)?(?:/\d+)?)"
)

# A unit leaves the value unchanged: %, degrees, two letters or more ("5km"), or words after a space
# ("5 apples", "5 m"), perhaps squared or cubed. These words are not units; they make an expression.
_NOT_A_UNIT = r"(?:pi|\u03c0|[ikxyz]|sqrt|sin|cos|tan|log|ln|mod|or|and)(?![^\W\d_])"
_WORD = rf"(?!{_NOT_A_UNIT})[^\W\d_]"
_UNIT = (
    rf"(?:%|\u00b0[CF]?|{_WORD}[^\W\d_]+|\s+{_WORD}[^\W\d_]*)"
    rf"(?:[\s.'/-]+{_WORD}[^\W\d_]*)*(?:\s*\^\s*(?:[23]|\{{[23]\}}))?"
)
_QUANTITY = re.compile(rf"({NUMBER.pattern})\.?\s*(?:{_UNIT})?\.?")

# The text after a number that is only the first part of an expression or a list.
CONTINUES = re.compile(
    r"\s*(?:\^|\\(?:pi|sqrt|times|cdot)|[\u03c0\u221a]|[*\u00d7+]\s*\d|[xyz](?!\w))|,\d"
)
_SEVERAL_VALUES = re.compile(r"=.*(?:,\s*[^\W\d_]|,\s|;|\bor\b|\band\b).*=", re.I | re.S)

# Longer digits or texts are repetition, not an answer, and slow to convert.
_MAX_DIGITS, _MAX_CHARACTERS = 200, 2000

# Markup around numbers and its plain form, applied in this order.
_PLAIN_FORMS = [
    (re.compile(pattern), plain)
    for pattern, plain in [
        (r"[\u2212\u2013]", "-"),
        (r"\*\*|`", ""),
        (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<=\d)\s*(?=\\[cdt]?frac)", " "),
        (r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\1\2/\3\4 "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "\u00b0"),
        (
            r"(?<=\d)\s*(?:\\times|\\cdot|[\u00d7x*])\s*10\s*\^\s*"
            r"(?:\{([-+]?\d{1,3})\}|([-+]?\d{1,3}))",
            r"e\1\2",
        ),
        (r"\\[,;:! ()\[\]]", ""),
        (r"(?<![\d.,/])(\d{1,3})[ \u00a0\u202f](?=\d{3}(?![\d/]))", r"\1"),  # 10 000
        (r"\\?[$\u20ac\u00a3]", ""),
    ]
]


def plain_text(text: str) -> str:
    """Return the text without the LaTeX, Markdown and currency signs around its numbers."""
    for pattern, plain in _PLAIN_FORMS:
        text = pattern.sub(plain, text)
    return text


def parse_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number, perhaps with a unit; None for other texts.

    An equation has the value of its last side: "x = 5" is 5.
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    text = plain_text(text)
    if _SEVERAL_VALUES.search(text):
        return None
    text = text.rpartition("=")[2].strip(" :()").rstrip(". ")
    text = re.sub(r"^([-+])\s+", r"\1", text)
    match = _QUANTITY.fullmatch(text)
    if match is None or len(match[1]) > _MAX_DIGITS:
        return None
    number = match[1].replace(",", "")
    try:
        value = sum(map(Fraction, number.lstrip("+-").split()), Fraction(0))
    except (ValueError, ZeroDivisionError):
        return None
    return -value if number.startswith("-") else value
