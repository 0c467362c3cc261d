"""The graders that `validation.grader` names: one function each, and a row in `GRADERS`.

A grader compares a response with the gold answer. The built-in ones see the response without its
thinking, which ends at `</think>`; a response that never ends its thinking is wrong.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ConfigError, first_line
from opd_titan.grading.answers import extract_answer, last_boxed, same_answer, without_thinking
from opd_titan.grading.choice import find_choice, letter_of
from opd_titan.grading.math import math_judge
from opd_titan.grading.numbers import WHOLE, parse_number


class Grade(NamedTuple):
    """The result of grading a response.

    score: from 0 to 1; a bool from graders that know only right and wrong.
    extracted: the answer found in the response, None if none was.
    """

    score: bool | float
    extracted: str | None = None


def auto(response: str, gold: str) -> Grade:
    """Compare numbers, or words, in the forms that `extract_answer` finds."""
    found = extract_answer(response, numeric=_is_number(gold))
    return Grade(found is not None and same_answer(found, gold), found)


_GSM8K_ANSWER = re.compile(rf"####[ \t]*(-?[$]?-?(?:{WHOLE}(?:\.\d+)?|\.\d+))(?=%|[.,]*(?:\s|$))")


def gsm8k(response: str, gold: str) -> Grade:
    """Accept only a number after the last `####`, the form of GSM8K itself."""
    found = _GSM8K_ANSWER.match(response, max(0, response.rfind("####")))
    if found is None:
        return Grade(False)
    return Grade(parse_number(found[1]) == parse_number(gold), found[1])


def math_answer(response: str, gold: str) -> Grade:
    """Compare the last `\\boxed{}`, or the last expression if there is no box."""
    if last_boxed(response) is not None:
        return boxed_answer(response, gold)
    return Grade(*math_judge.find(response, gold))


def boxed_answer(response: str, gold: str) -> Grade:
    """Compare the last `\\boxed{}`; without one a response is wrong."""
    boxed = last_boxed(response)
    return Grade(boxed is not None and math_judge.equals(boxed, gold), boxed)


def choice(response: str, gold: str) -> Grade:
    """Compare the letter that the response chooses."""
    letter = find_choice(response)
    return Grade(letter is not None and letter == letter_of(gold), letter)


def exact(response: str, gold: str) -> Grade:
    """Compare the whole response, ignoring case and the number of spaces."""
    found, wanted = (" ".join(text.split()).casefold() for text in (response, gold))
    return Grade(found == wanted, found)


def _is_number(gold: str) -> bool:
    return parse_number(gold) is not None


def _is_letter(gold: str) -> bool:
    return letter_of(gold) is not None


@dataclass(frozen=True)
class Grader:
    """A grader and what it needs.

    Attributes:
        name: its name in the configuration.
        grade: (response, gold answer) -> Grade.
        can_grade: returns whether this grader can compare with a gold answer.
        golds: describes such gold answers, for error messages.
        package: an optional package that it imports, empty for none.
        sees_thinking: whether it is given the whole response, including the thinking.
    """

    name: str
    grade: Callable[[str, str], Grade]
    can_grade: Callable[[str], bool] = lambda gold: True
    golds: str = ""
    package: str = ""
    sees_thinking: bool = False

    def __call__(self, response: str, gold: str) -> Grade:
        """Grade one response.

        Raises:
            ConfigError: the user's own grader raised an error, or did not return a score.
        """
        beat()  # a user's own grader may be slow, asking a model on another machine
        answer = response if self.sees_thinking else without_thinking(response)
        return Grade(False) if answer is None else self.grade(answer, gold)

    def score(self, response: str, gold: str) -> bool | float | None:
        """Return the score of a response, None if this grader cannot grade the gold answer."""
        return self(response, gold).score if self.can_grade(gold) else None


GRADERS = {
    grader.name: grader
    for grader in (
        Grader("auto", auto),
        Grader("gsm8k", gsm8k, _is_number, "a number"),
        Grader("math", math_answer, package="math_verify"),
        Grader("boxed", boxed_answer, package="math_verify"),
        Grader("choice", choice, _is_letter, 'a letter, such as "B", "(B)" or "B) Paris"'),
        Grader("exact", exact),
    )
}


def load_grader(name: str, key: str) -> Grader:
    """Return a built-in grader, or one that calls the user's own function.

    Args:
        name: a name in `GRADERS`, or `package.module:function`. The function is called as
            function(response, answer) with the whole response, and returns a bool or a score from
            0 to 1.
        key: the configuration key that names the grader, for errors.

    Raises:
        ConfigError: there is no such function, or a package that the grader needs is missing.
    """
    if name in GRADERS:
        package = GRADERS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key}: {name!r} needs the package {package.replace('_', '-')}, which is not "
                "installed; install it with pip install 'opd_titan[math]'"
            )
        return GRADERS[name]
    try:
        function = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # a module may raise anything when it is imported
        raise ConfigError(
            f"{key}: {name!r} cannot be imported ({type(error).__name__}: {first_line(error)}); "
            "expected package.module:function, in the working directory or on PYTHONPATH"
        ) from error
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise ConfigError(
            f"{key}: {name!r} cannot be called as function(response, answer) ({error})"
        ) from error
    except ValueError:  # a builtin function has no signature to check
        pass
    return Grader(name, _checked(function, f"{key} = {name!r}"), sees_thinking=True)


def _checked(function: Callable[[str, str], Any], label: str) -> Callable[[str, str], Grade]:
    """Wrap a user's function so that its errors and wrong results raise ConfigError."""
    expected = "expected a bool, or a number from 0 to 1"

    def grade(response: str, gold: str) -> Grade:
        try:
            score = function(response, gold)
            score = score if isinstance(score, bool) else float(score)
        except (Exception, SystemExit) as error:  # SystemExit would end the run as if it were done
            raise ConfigError(
                f"{label} failed: {type(error).__name__}: {first_line(error)}; {expected}"
            ) from error
        if not (math.isfinite(score) and 0.0 <= score <= 1.0):
            raise ConfigError(f"{label} returned {score}; {expected}")
        return Grade(score)

    return grade
