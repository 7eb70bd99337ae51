"""Fixtures of several test files."""

import pytest

from lora_nlu import kernels


@pytest.fixture
def torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout as torch draws it, not the compiled kernels: what can be compared with somebody else's draw."""
    monkeypatch.setattr(kernels, "library", lambda: None)
