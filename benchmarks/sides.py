"""The models that are compared, ours and the peer, with random weights, and a step of each."""

from contextlib import nullcontext
from typing import Any

import torch
from common import XXLARGE
from torch import Tensor
from transformers import DebertaV2Config, RobertaConfig

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
VOCABULARY = {"vocab_size": ROBERTA["vocab_size"]}  # rows that no batch names would only fill memory
DEBERTA_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "conv_kernel_size": 0}
MODELS: dict[str, tuple[type, dict]] = {
    "roberta-base": (RobertaConfig, ROBERTA),
    "deberta-base": (DebertaV2Config, XXLARGE | VOCABULARY | DEBERTA_BASE | {"num_hidden_layers": 12}),
    "deberta-xxlarge-3-layers": (DebertaV2Config, XXLARGE | VOCABULARY | {"num_hidden_layers": 3}),
}
LORA_R, LORA_ALPHA, LABELS = 8, 16, 2


def configure(name: str, layers: int | None) -> Any:
    kind, settings = MODELS[name]
    config = kind(**settings, num_labels=LABELS)
    if layers:
        config.num_hidden_layers = layers
    return config


def build_peer(config: Any) -> torch.nn.Module:
    """transformers' own class with PEFT around it, as their documentation has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import DebertaV2ForSequenceClassification, RobertaForSequenceClassification

    is_roberta = isinstance(config, RobertaConfig)
    model = (RobertaForSequenceClassification if is_roberta else DebertaV2ForSequenceClassification)(config)
    targets = ["query", "value"] if is_roberta else ["query_proj", "value_proj"]
    head = None if is_roberta else ["classifier", "pooler"]  # what ours trains too
    settings = {"r": LORA_R, "lora_alpha": LORA_ALPHA, "target_modules": targets, "modules_to_save": head}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings))


def build_ours(config: Any) -> torch.nn.Module:
    from lora_nlu.methods.marking import mark_only_lora_as_trainable
    from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
    from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

    config.apply_lora, config.lora_r, config.lora_alpha = True, LORA_R, LORA_ALPHA
    is_roberta = isinstance(config, RobertaConfig)
    model = (RobertaForSequenceClassification if is_roberta else DebertaV2ForSequenceClassification)(config)
    mark_only_lora_as_trainable(model)
    return model


def make_batch(lengths: list[int], padded: int, seed: int, pad: int, vocabulary: int = 50000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = padded or max(lengths)
    ids = torch.randint(4, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    labels = torch.randint(LABELS, (len(lengths),), generator=generator)
    return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long(), "labels": labels}


class Side:
    """A model and its optimizer; the step is what transformers' Trainer does with both."""

    def __init__(self, model: torch.nn.Module, pad: int) -> None:
        self.model, self.pad = model, pad
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def train(self, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> None:
        self.model.train()
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(**batch).logits.sum().item()
