"""Fixtures of several test files."""

import signal

import pytest

from lora_nlu import kernels

# Started in the background by a shell, this process ignores Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout as torch draws it, not the compiled kernels: what can be compared with somebody else's draw."""
    monkeypatch.setattr(kernels, "library", lambda: None)
