"""Examples from GLUE and from files of your own, tokenised; tasks and metrics."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.data.loading import load_examples as load_examples
    from lora_nlu.data.metrics import compute_metrics as compute_metrics
    from lora_nlu.data.tasks import TASKS as TASKS
    from lora_nlu.data.tokenization import tokenize as tokenize

__getattr__, __all__ = lazy_names(
    __name__, {"loading": "load_examples", "metrics": "compute_metrics", "tasks": "TASKS", "tokenization": "tokenize"}
)
