"""oneDNN's products are tested on every processor, though on Intel's the library leaves them to MKL."""

import pytest

from lora_nlu.ops import kernels


@pytest.fixture(autouse=True)
def onednn_where_it_is_there(monkeypatch):
    monkeypatch.setattr(kernels, "has_onednn", lambda: kernels.ONEDNN_LINEAR is not None)
