"""The Hugging Face hub: the form of an id, and a quick failure when it cannot be reached."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from opd_titan.errors import first_line

_TIMEOUT = 10.0  # seconds


def looks_like_hub_id(name: str) -> bool:
    """Return whether `name` can be "org/name"; a path that starts with `.`, `/` or `~` cannot."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


@contextmanager
def hub_in_reach() -> Iterator[str]:
    """Use only earlier downloads in the body if the hub does not answer.

    The hub's own clients would retry for half a minute, and log each attempt.

    Yields:
        The reason why the hub does not answer, for error messages; "" if it answers.
    """
    import datasets
    from huggingface_hub import constants

    trouble = "" if constants.HF_HUB_OFFLINE else _trouble(constants.ENDPOINT)
    with ExitStack() as undo:
        if trouble:
            settings: Any
            for settings in (constants, datasets.config):
                undo.callback(setattr, settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)
                settings.HF_HUB_OFFLINE = True
        yield trouble


@cache
def _trouble(endpoint: str) -> str:
    from huggingface_hub.utils import get_session

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception as error:  # its class depends on the HTTP client of this version
        return f"the hub at {endpoint} does not answer ({first_line(error)})"
    return ""
