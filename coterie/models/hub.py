"""Whether the hub can be reached, asked once: its own client tries for half a minute for each file."""

from __future__ import annotations

import os
from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from coterie.errors import first_line

_SECONDS = 5.0  # for an answer of any kind


@cache
def why_unreachable() -> str | None:
    """Why nothing can be fetched, in words, or None. Where it can't, the hub's clients use from here on what is on the disk."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # the client's own errors, those of proxies, certificates and names
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, which reads it when it is imported
        reason = str(error).strip() or type(error).__name__
        return f"{constants.ENDPOINT} can't be reached ({reason})"
    return None


def hub_reason(error: Exception) -> str:
    """The reason why something of the hub can't be had, in one sentence."""
    unreachable = why_unreachable()
    if unreachable is not None:
        return f"{unreachable}, and it is not among what was downloaded before; download it where there is a network, and name the folder"
    return first_line(error)
