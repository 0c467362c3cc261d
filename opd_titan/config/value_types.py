"""The types of option values. pydantic checks each value against the type of its field.

Values from TOML must have the right type; only an integer is also accepted as a float.
Command-line values are text, and pydantic converts them.
"""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict

from opd_titan.errors import without_credentials

GRADERS = ("auto", "gsm8k", "math", "boxed", "choice", "exact")
_OWN_GRADER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# The largest finite values of bfloat16 and float32 are just above this.
_LARGEST_FLOAT = 3e38


def literal(value: Any) -> str:
    """Return `value` in TOML syntax. TOML strings have JSON's escapes, and one for DEL."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def show(value: Any) -> str:
    """Return `value` for a message: in TOML syntax, shortened, without credentials."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of over 60 digits"  # Python refuses to print more than 4,300
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "a table"
    # pydantic cannot handle messages with lone surrogates.
    text = without_credentials(literal(value)).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


# Each check below returns the value, or raises ValueError with the message for the user.


def _check_integer(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{show(value)} does not fit in 64 bits")
    return value


def _check_float(value: float) -> float:
    if not abs(value) <= _LARGEST_FLOAT:  # true for nan as well
        raise ValueError(f"{show(value)} is not a finite 32-bit number")
    return value


def _check_text(value: str) -> str:
    # The command line gives undecodable bytes as lone surrogates. A path cannot contain NUL.
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{show(value)} contains a NUL or bytes that are not UTF-8")
    if without_credentials(value) != value:
        raise ValueError(
            "contains a URL with a user name or password, which the run would write to its folder"
        )
    return value


def _check_path(value: str, wanted: str) -> str:
    if "://" in value:  # the rest is not quoted: it may contain a signature
        scheme = show(value.partition("://")[0] + "://...")
        raise ValueError(f"{scheme} is a URL; wanted {wanted}")
    if len(value.encode()) > 4095 or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError(f"{show(value)} ({len(value)} characters) is too long for a path")
    return value


def _check_source(value: str) -> str:
    _check_path(value, "a local path or a hub id")
    if os.path.expanduser(value).startswith("~"):
        raise ValueError(
            f"{show(value)}: no such user; wanted ~/..., or ./~... for a file of that name"
        )
    return value


def _check_folder(value: str) -> str:
    _check_path(value, "a local path")
    if value.startswith("~"):
        raise ValueError(
            f"{show(value)}: ~ is not expanded here; wanted a full path, or ./~... for that name"
        )
    return value


def _check_grader(value: str) -> str:
    if value and value not in GRADERS and not _OWN_GRADER.fullmatch(value):
        raise ValueError(
            f"{show(value)} is not a grader; wanted one of {', '.join(GRADERS)}, or your own as "
            "package.module:function"
        )
    return value


Switch = Annotated[bool, Strict()]

Integer = Annotated[int, Strict(), AfterValidator(_check_integer)]
Count = Annotated[Integer, Field(ge=0)]
PositiveCount = Annotated[Integer, Field(ge=1)]

Number = Annotated[float, Strict(), AfterValidator(_check_float)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
FractionBelowOne = Annotated[Number, Field(ge=0, lt=1)]

Text = Annotated[str, Strict(), AfterValidator(_check_text)]
NonEmptyText = Annotated[Text, Field(min_length=1)]
Source = Annotated[Text, AfterValidator(_check_source)]
"""A path or hub id to read from."""
Folder = Annotated[Text, AfterValidator(_check_folder)]
"""A folder to write to."""
Grader = Annotated[Text, AfterValidator(_check_grader)]
"""The name of a grader, or `package.module:function`. Empty: see the field."""
