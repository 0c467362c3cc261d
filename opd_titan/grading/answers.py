"""Find the final answer in a response, and compare it with the gold answer.

The places where a response states its answer, in order of trust: a line after the last `####`
(GSM8K's own form), the last `\\boxed{}`, the last "the answer is ...", the last number.
"""

from __future__ import annotations

import re

from opd_titan.grading.numbers import CONTINUES, NUMBER, parse_number, plain_text

_ANNOUNCEMENT = re.compile(
    r"\banswer\s*(?:is|was|:|=|equals|would be)(.*?)(?:[.!?](?=\s)|\n|$)", re.IGNORECASE
)
_BRACE = re.compile(r"\\[{}]|\\f?boxed\s*\{|[{}]")


def after_prompt(prompt: str, response: str) -> str:
    """Return the response, after `<think>` if its prompt ends with this tag.

    The chat templates of DeepSeek-R1 and Qwen3-Thinking open the tag, so a response that is cut off
    while thinking has no tag of its own.
    """
    return "<think>" + response if prompt.rstrip().endswith("<think>") else response


def without_thinking(response: str) -> str | None:
    """Return the text after the last `</think>`; None if the thinking never ends."""
    _, end, answer = response.rpartition("</think>")
    return None if not end and "<think>" in response else answer


def extract_answer(text: str, numeric: bool = True) -> str | None:
    """Return the final answer that a text gives, None if it gives none.

    Args:
        text: a response, without its thinking.
        numeric: whether the gold answer is a number. If not, an answer can be words, or a whole
            response of one line, but never the last number of a text.
    """
    boxed, boxed_at = _last_boxed(text)
    marker = text.rfind("####")
    if marker > boxed_at:  # a box after it wins: "####" is also a Markdown heading
        line = text[marker:].lstrip("# :\n").split("\n", 1)[0]
        if (answer := _announced_answer(line, numeric)) is not None:
            return answer
    if boxed is not None:
        return boxed
    announced = _ANNOUNCEMENT.findall(plain_text(text))
    if announced and (answer := _announced_answer(announced[-1], numeric)) is not None:
        return answer
    if numeric:
        numbers = NUMBER.findall(plain_text(text))
        return numbers[-1] if numbers else None
    line = text.strip()
    return line if line and "\n" not in line else None


def same_answer(answer: str, gold: str) -> bool:
    """Return whether two numbers are equal, or two texts differ only in case and spaces."""
    number = parse_number(gold)
    if number is not None:
        return parse_number(answer) == number
    return _normalize_words(answer) == _normalize_words(gold)


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}` that is closed and not empty, None without one."""
    return _last_boxed(text)[0]


def _last_boxed(text: str) -> tuple[str | None, int]:
    """Return the content of the last `\\boxed{}` and its position; None, -1 without one.

    Braces are matched from the end in one pass: a degenerate response may open thousands of boxes.
    """
    closing: list[int] = []
    for brace in reversed(list(_BRACE.finditer(text))):
        if brace[0] == "}":
            closing.append(brace.start())
        elif brace[0] not in ("\\{", "\\}") and closing:
            content = text[brace.end() : closing.pop()].strip()
            if brace[0] != "{" and content:
                return content, brace.start()
    return None, -1


def _announced_answer(line: str, numeric: bool) -> str | None:
    """Return the number after the last "=" of an announcement, else its first number.

    Return the whole line if that number is only a part of it, as in "5x", "10^5" and "(2, 3)", and
    for answers that are words.
    """
    line = plain_text(line)
    if not numeric:
        return line.strip(" :.") or None
    match = NUMBER.search(line, line.rfind("=") + 1) or NUMBER.search(line)
    if match is None:
        return None
    before, after = line[: match.start()].rstrip(), line[match.end() :]
    if CONTINUES.match(after) or (before.endswith(("(", "[")) and after.lstrip().startswith(",")):
        return line.strip()
    sign = "-" if re.search(r"(?:^|[=:])\s*-$", before) else ""
    return sign + match[0]


def _normalize_words(text: str) -> str:
    return " ".join(plain_text(text).split()).casefold().strip(" .()")
