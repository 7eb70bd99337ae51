"""The command line, the `Trainer` subclass, checkpoints and the records of runs."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.training.parsing import parse_arguments as parse_arguments
    from lora_nlu.training.runs import evaluate as evaluate
    from lora_nlu.training.runs import predict as predict
    from lora_nlu.training.runs import train as train
    from lora_nlu.training.trainer import AdapterTrainer as AdapterTrainer

__getattr__, __all__ = lazy_names(__name__, __file__)
