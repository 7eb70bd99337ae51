"""Fixtures of several test files."""

import gc
import signal

import pytest

from lora_nlu.ops import kernels

# Started in the background or by nohup, this process ignores Ctrl-C or a closed terminal, and so would every program
# that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Leave all modules out of garbage collections, of which every training asks for several: 0.3 s each otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout as torch draws it, not the compiled kernels: what can be compared with somebody else's draw."""
    monkeypatch.setattr(kernels, "library", lambda: None)
