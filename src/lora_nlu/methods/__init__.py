"""What of a model trains: LoRA, BitFit, bottleneck adapters, the head alone or everything; table.py has a row each."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.methods.description import Description as Description
    from lora_nlu.methods.description import description_of as description_of
    from lora_nlu.methods.linear import merge_lora_ as merge_lora_
    from lora_nlu.methods.linear import unmerge_lora_ as unmerge_lora_
    from lora_nlu.methods.lora import LoRALinear as LoRALinear
    from lora_nlu.methods.marking import count_parameters as count_parameters
    from lora_nlu.methods.marking import describe_method as describe_method
    from lora_nlu.methods.marking import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from lora_nlu.methods.marking import mark_trainable as mark_trainable
    from lora_nlu.methods.method import Flag as Flag
    from lora_nlu.methods.method import Method as Method
    from lora_nlu.methods.table import METHODS as METHODS

__getattr__, __all__ = lazy_names(__name__, __file__)
