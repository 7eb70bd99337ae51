"""The command line, the `Trainer` subclass, checkpoints and the records of runs."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.training.trainer import AdapterTrainer as AdapterTrainer

__getattr__, __all__ = lazy_names(__name__, {"trainer": "AdapterTrainer"})
