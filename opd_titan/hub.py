"""What an id on the Hugging Face hub looks like."""

from __future__ import annotations

import re


def looks_like_hub_id(name: str) -> bool:
    """Tell whether `name` can be "org/name"; a path that starts with `.`, `/` or `~` cannot."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
