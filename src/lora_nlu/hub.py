"""The Hugging Face Hub: what may be on it, and whether it answers. Without it, only earlier downloads can be read."""

import re
import sys
import threading
from contextlib import suppress
from pathlib import Path

import huggingface_hub

TIMEOUT_S = 4
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def looks_like_hub_id(name: str) -> bool:
    """Whether the name of a model, tokenizer, adapter or data set is not a local path and could be a Hub id."""
    return len(name) < 200 and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def look_for_hub(*names: str | None) -> list[str]:
    """Call this before reading what has these names: if one could be a Hub id, see whether the Hub answers.

    If it does not, only what was downloaded before is read from then on. Returns lines to print.
    """
    if not any(name and looks_like_hub_id(name) for name in names):
        return []
    return [line for line in [use_cache_if_unreachable()] if line]


def use_cache_if_unreachable() -> str:
    """If the Hub does not answer, read only what was downloaded before, instead of retrying for minutes.

    Returns a line to print that says so, or "". Without an answer it returns after `TIMEOUT_S`.
    """
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return ""
    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):  # every HTTP library has its own exceptions for no answer
            answers.append(huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S).status_code < 500)

    thread = threading.Thread(target=ask, daemon=True)  # the timeout of `head` does not end a DNS look-up
    thread.start()
    thread.join(TIMEOUT_S)
    if any(answers):
        return ""
    constants.HF_HUB_OFFLINE = True
    if config := getattr(sys.modules.get("datasets"), "config", None):  # imported later, it copies the constant
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True
    return f"The Hub ({constants.ENDPOINT}) does not answer: only what was downloaded before is used."
