"""Adapter files: read, written, attached to a model, converted."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.adapters.adapter import Adapter as Adapter
    from lora_nlu.adapters.attaching import attach_adapter as attach_adapter
    from lora_nlu.adapters.reading import read_adapter as read_adapter
    from lora_nlu.adapters.writing import save_adapter as save_adapter

__getattr__, __all__ = lazy_names(__name__, __file__)
