"""Find the letter that a response to a multiple-choice question chooses."""

from __future__ import annotations

import re

from opd_titan.grading.answers import last_boxed

# "B", "(B)", "B."; not the article in "A dog" nor the "I" of "I'm".
_LETTER = r"[(\[]?\s*([A-Z])(?![\w'])\s*[)\].:]*"
_NAME = r"(?:(?:the\s+)?(?:answer|option|choice|letter)(?:\s*:\s*|\s+))?"
# After a letter that is announced: no second letter, and the end of the sentence or a reason.
# "A, B" and "A or B" are not an answer; "B, C is wrong" is one.
_NO_OTHER = r"(?![)\].:\s]*(?:[,/&+]|or\b|and\b)\s*[(\[]?[A-Z][)\]]?\s*(?:[.,;]|$|\n))"
_END = r"(?=\s*(?:$|[^\w\s]|\n))"
_END_OR_REASON = r"(?=\s*(?:$|[^\w\s]|\n|because|since|as\b))"

# A line or box that is only a letter, and one that begins with a labelled letter: "B) Paris".
_ALONE = re.compile(rf"\s*{_NAME}{_LETTER}\s*", re.IGNORECASE)
_LABEL = re.compile(r"\s*[(\[]?([A-Z])(?:[)\].:]|\s*$)")
_ANSWER_IS = re.compile(
    r"(?:answer|choice|option|letter)\s*(?:(?:is|was|would be|:|=)[\s:]*)+"
    r"(?:(?:clearly|therefore|thus|definitely)\s+)?"
    rf"{_NAME}{_LETTER}{_NO_OTHER}{_END_OR_REASON}",
    re.IGNORECASE,
)
# Weaker words. The letter must be a capital: "it is a dog".
_IS_CORRECT = re.compile(r"(?<![\w'])[(\[]?([A-Z])[)\]]? is (?:the )?(?:correct|right|best)\b")
_CHOSEN = re.compile(
    rf"\b(?:[Ii]t(?:'s| is)|[Cc]hoose|[Pp]ick|[Ss]elect) {_LETTER}{_NO_OTHER}{_END}"
)
_STYLE = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|\*\*|[$`\"\u201c\u201d]|\\[()\[\]]|</?answer>"
)


def letter_of(text: str) -> str | None:
    """Return the letter of a text that is one choice, like "B", "(b)", "B) Paris"; else None."""
    found = _ALONE.fullmatch(text) or _LABEL.match(text)
    return found[1].upper() if found else None


def find_choice(response: str) -> str | None:
    """Return the letter that a response gives, None if it gives none, or several.

    The order of trust is: the last box, the last "answer is", the last or first line, "B is
    correct".
    """
    text = _STYLE.sub(r"\1", response)
    boxed = last_boxed(text)
    return (
        (letter_of(boxed) if boxed else None)
        or _last(_ANSWER_IS, text)
        or _letter_on_a_line(text)
        or _last(_IS_CORRECT, text)
        or _last(_CHOSEN, text)
    )


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].upper() if found else None


def _letter_on_a_line(text: str) -> str | None:
    """Return the letter of the last line, else of the first; None for a list of the options."""
    lines = [line for line in text.splitlines() if line.strip()]
    labels = {match[1] for line in lines if (match := _LABEL.match(line))}
    for line in (lines[-1], lines[0]) if lines else ():
        letter = letter_of(line)
        if letter is not None and (len(labels) < 2 or _ALONE.fullmatch(line)):
            return letter
    return None
