"""LoRA fine-tuning of RoBERTa and DeBERTa-V2 on GLUE, on real tokens only, with adapter files as output."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.adapters.adapter import Adapter as Adapter
    from lora_nlu.adapters.attaching import attach_adapter as attach_adapter
    from lora_nlu.adapters.loading import load as load
    from lora_nlu.adapters.reading import read_adapter as read_adapter
    from lora_nlu.adapters.writing import save_adapter as save_adapter
    from lora_nlu.methods.linear import merge_lora_ as merge_lora_
    from lora_nlu.methods.linear import unmerge_lora_ as unmerge_lora_
    from lora_nlu.methods.lora import LoRALinear as LoRALinear
    from lora_nlu.methods.marking import count_parameters as count_parameters
    from lora_nlu.methods.marking import mark_trainable as mark_trainable
    from lora_nlu.models.loading import load_model as load_model
    from lora_nlu.models.modeling_deberta_v2 import (
        DebertaV2ForSequenceClassification as DebertaV2ForSequenceClassification,
    )
    from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model as DebertaV2Model
    from lora_nlu.models.modeling_roberta import (
        CamembertForSequenceClassification as CamembertForSequenceClassification,
    )
    from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification as RobertaForSequenceClassification
    from lora_nlu.models.modeling_roberta import RobertaModel as RobertaModel
    from lora_nlu.models.modeling_roberta import (
        XLMRobertaForSequenceClassification as XLMRobertaForSequenceClassification,
    )

__version__ = "0.3.0"

__getattr__, __all__ = lazy_names(__name__, __file__)
