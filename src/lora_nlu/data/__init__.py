"""Examples from GLUE and from files of your own, tokenised; tasks and metrics."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.data.glue import load_glue as load_glue
    from lora_nlu.data.metrics import compute_metrics as compute_metrics
    from lora_nlu.data.tasks import TASKS as TASKS
    from lora_nlu.data.tokenization import tokenize as tokenize
    from lora_nlu.data.user_files import load_files as load_files

__getattr__, __all__ = lazy_names(__name__, __file__)
