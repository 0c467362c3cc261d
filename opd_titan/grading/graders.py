"""The graders that `validation.grader` names. A new one is one small function with `@grader` above.

A grader is given a response's text and the gold answer, and tells how right it is and what it took
for the response's answer. What stands before `</think>` is never looked at, and a response that
opens `<think>` without closing it was cut off before its answer: it is wrong.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ConfigError, first_line
from opd_titan.grading import answers as grading
from opd_titan.grading.math import math_judge


class Grade(NamedTuple):
    """How right a response is, and what it was judged by.

    score: 0 to 1; False and True where there is nothing between.
    extracted: the answer found in the response; None where none was.
    """

    score: bool | float
    extracted: str | None = None

    @property
    def correct(self) -> bool:
        """Whether it has full marks."""
        return self.score >= 1.0


def _anything(gold: str) -> bool:
    return True


@dataclass(frozen=True)
class Grader:
    """One way to tell right from wrong.

    name: as the config has it.
    judge: (response without its thinking, gold answer) -> Grade.
    can_grade: whether a gold answer is one that this grader knows what to do with.
    golds: in words, what such an answer is.
    prepare: raises ConfigError, given the key at fault, where what the grader needs is not there.
    """

    name: str
    judge: Callable[[str, str], Grade]
    can_grade: Callable[[str], bool] = _anything
    golds: str = "text"
    prepare: Callable[[str], None] = lambda where: None
    strips_thinking: bool = True

    def __call__(self, response: str, gold: str) -> Grade:
        """Grade one response.

        Raises:
            ConfigError: of the user's own grader, whatever it raised or returned amiss.
        """
        beat()  # a user's own may ask a model somewhere else
        if self.strips_thinking:
            after = grading.without_thinking(response)
            if after is None:
                return Grade(False)
            response = after
        return self.judge(response, gold)

    def score(self, response: str, gold: str) -> bool | float | None:
        """None where the gold answer is none that this grader knows: of training prompts, say."""
        return self(response, gold).score if self.can_grade(gold) else None


GRADERS: dict[str, Grader] = {}


def grader(name: str, **traits: Any) -> Callable[[Callable], Callable]:
    """Enter the function below under `name` in `GRADERS`."""

    def enter(judge: Callable[[str, str], Grade]) -> Callable:
        GRADERS[name] = Grader(name, judge, **traits)
        return judge

    return enter


def _is_number(gold: str) -> bool:
    return grading.normalize_number(gold) is not None


@grader("auto", strips_thinking=False)
def auto(response: str, gold: str) -> Grade:
    """Numbers, or words, in all the forms that `grading.extract_answer` knows."""
    found = grading.extract_answer(response, numeric=_is_number(gold))
    return Grade(found is not None and grading.same_answer(found, gold), found)


_STRICT = re.compile(rf"####[ \t]*(-?[$]?-?(?:{grading.WHOLE}(?:\.\d+)?|\.\d+))(?=%|[.,]*(?:\s|$))")


@grader("gsm8k", can_grade=_is_number, golds="a number")
def gsm8k(response: str, gold: str) -> Grade:
    """Only a number after the last `####`, the form that GSM8K itself has."""
    after = _STRICT.match(response, response.rfind("####")) if "####" in response else None
    if after is None:
        return Grade(False)
    same = grading.normalize_number(after[1]) == grading.normalize_number(gold)
    return Grade(same, after[1])


# Whether the optional packages are there is asked once; answers are judged in a process of its own.
@grader("math", golds="a number, an expression or LaTeX", prepare=math_judge.require)
def math_answer(response: str, gold: str) -> Grade:
    """The last `\\boxed{}`, else what math-verify takes for the final expression."""
    boxed = grading.last_boxed(response)
    if boxed is not None:
        return Grade(*math_judge.compare_boxed(boxed, gold))
    return Grade(*math_judge.compare_text(response, gold))


@grader("boxed", golds="a number, an expression or LaTeX", prepare=math_judge.require)
def boxed_answer(response: str, gold: str) -> Grade:
    """Only the last `\\boxed{}` counts."""
    boxed = grading.last_boxed(response)
    if boxed is None:
        return Grade(False)
    return Grade(*math_judge.compare_boxed(boxed, gold))


# "(B)", "B.", "B) Paris"; not the article in "A dog" nor the "I" of "I think".
_LETTER = r"[(\[]?\s*([A-Z])(?![\w'])\s*[)\].:]*"
_NAMED = r"(?:(?:the\s+)?(?:answer|option|choice|letter)(?:\s*:\s*|\s+))?"
_ALONE = re.compile(rf"\s*{_NAMED}{_LETTER}\s*", re.IGNORECASE)
_LABEL = re.compile(r"\s*[(\[]?([A-Z])(?:[)\].:]|\s*$)")
# "A, B" and "A or B" are no answer; "B, C is wrong" is one.
_ONLY = r"(?![)\].:\s]*(?:[,/&+]|or\b|and\b)\s*[(\[]?[A-Z][)\]]?\s*(?:[.,;]|$|\n))"
_ANNOUNCED = re.compile(
    r"(?:answer|choice|option|letter)\s*(?:(?:is|was|would be|:|=)[\s:]*)+"
    r"(?:(?:clearly|therefore|thus|definitely)\s+)?"
    rf"{_NAMED}{_LETTER}{_ONLY}(?=\s*(?:$|[^\w\s]|\n|because|since|as\b))",
    re.IGNORECASE,
)
# Weaker words for it, so only the capital letter.
_CALLED = re.compile(
    r"(?<![\w'])[(\[]?([A-Z])[)\]]? is (?:the )?(?:correct|right|best)\b"
    rf"|\b(?:[Ii]t(?:'s| is)|[Cc]hoose|[Pp]ick|[Ss]elect) {_LETTER}{_ONLY}(?=\s*(?:$|[^\w\s]|\n))"
)
_STYLED = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|\*\*|[$`\"\u201c\u201d]|\\[()\[\]]|</?answer>"
)


def _choice_of(text: str) -> str | None:
    """The letter that a whole line or box is about: "B", "(b)", "B) Paris"."""
    found = _ALONE.fullmatch(text) or _LABEL.match(text)
    return found[1].upper() if found else None


def _choice_in(lines: list[str]) -> str | None:
    """The letter of the last line, else of the first; none where the options are just repeated."""
    labels = {match[1] for line in lines if (match := _LABEL.match(line))}
    for line in (lines[-1], lines[0]) if lines else ():
        found = _choice_of(line)
        if found is not None and (len(labels) < 2 or _ALONE.fullmatch(line)):
            return found
    return None


def _is_choice(gold: str) -> bool:
    return _choice_of(gold) is not None


@grader("choice", can_grade=_is_choice, golds='a letter, as "B", "(B)" or "B) Paris"')
def choice(response: str, gold: str) -> Grade:
    """A letter: in the last box, after the last "answer is", or on the last line by itself."""
    plain = _STYLED.sub(r"\1", response)
    boxed = grading.last_boxed(plain)
    found = _choice_of(boxed) if boxed is not None else None
    if found is None:
        announced = _ANNOUNCED.findall(plain)
        found = announced[-1].upper() if announced else None
    if found is None:
        found = _choice_in([line for line in plain.splitlines() if line.strip()])
    if found is None and (called := _CALLED.findall(plain)):
        found = "".join(called[-1])
    return Grade(found is not None and found == _choice_of(gold), found)


@grader("exact")
def exact(response: str, gold: str) -> Grade:
    """The whole response, spaces and case aside."""
    said, wanted = (" ".join(text.split()).casefold() for text in (response, gold))
    return Grade(said == wanted, said)


def load_grader(name: str, where: str) -> Grader:
    """The grader of this name, or of a user's own function, ready to use.

    Args:
        name: a row of `GRADERS`, or `package.module:function`, called as function(response, answer)
            with the whole response. It returns whether the response is right, or a score from 0
            to 1.
        where: the config key, for errors.

    Raises:
        ConfigError: there is no such function, or what the grader needs is not installed.
    """
    if name in GRADERS:
        GRADERS[name].prepare(where)
        return GRADERS[name]
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise ConfigError(
            f"{where}: {name!r} cannot be imported ({type(error).__name__}: {first_line(error)}); "
            "wanted package.module:function, found from the working directory or PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"{where}: {name!r} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise ConfigError(
            f"{where}: {name!r} cannot be called as function(response, answer) ({error})"
        ) from error
    except ValueError:  # of a builtin, which has none to show
        pass
    return Grader(name, _own(function, f"{where} = {name!r}"), strips_thinking=False)


def _own(function: Callable[[str, str], Any], named: str) -> Callable[[str, str], Grade]:
    """A user's function, held to its word."""

    def judge(response: str, gold: str) -> Grade:
        try:
            score = function(response, gold)
            score = bool(score) if isinstance(score, bool) else float(score)
        except (Exception, SystemExit) as error:  # or the run would end as if it were done
            raise ConfigError(
                f"{named} failed: {type(error).__name__}: {first_line(error)}; wanted a bool, or "
                "a number from 0 to 1"
            ) from error
        if not (math.isfinite(score) and 0.0 <= score <= 1.0):
            raise ConfigError(f"{named} returned {score}; wanted a bool, or a number from 0 to 1")
        return Grade(score)

    return judge
