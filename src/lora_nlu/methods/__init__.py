"""What of a model trains: LoRA, BitFit, bottleneck adapters, the head alone or everything."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.methods.description import set_method as set_method
    from lora_nlu.methods.lora import LoRALinear as LoRALinear
    from lora_nlu.methods.lora import merge_lora_ as merge_lora_
    from lora_nlu.methods.lora import unmerge_lora_ as unmerge_lora_
    from lora_nlu.methods.table import count_parameters as count_parameters
    from lora_nlu.methods.table import describe_method as describe_method
    from lora_nlu.methods.table import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from lora_nlu.methods.table import mark_trainable as mark_trainable

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "description": "set_method",
        "lora": "LoRALinear merge_lora_ unmerge_lora_",
        "table": "count_parameters describe_method mark_only_lora_as_trainable mark_trainable",
    },
)
