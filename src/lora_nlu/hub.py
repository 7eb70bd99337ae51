"""The Hugging Face Hub: whether it answers. Without it, only what was downloaded before can be read."""

import sys
import threading
from contextlib import suppress

import huggingface_hub

TIMEOUT_S = 4


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
