"""RoBERTa and DeBERTa-V2 with LoRA written into them, and loading of their checkpoints."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.models.loading import load_config as load_config
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

__getattr__, __all__ = lazy_names(__name__, __file__)
