"""Small models with LoRA, their adapters in files, and what reading one answers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    ragged_batch,
    randomise_,
    tiny_config,
    tiny_deberta_config,
)
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

from lora_nlu.adapters.attaching import load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

R, ALPHA = 4, 6
LABELS = ["yes", "no", "perhaps"]
METADATA_OF_RUN = {"task": "custom", "labels": LABELS, "base_model": "tiny", "seed": 3}
HEAD = ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"]


def lora_model(seed: int = 0, **settings) -> RobertaForSequenceClassification:
    """Our classifier with LoRA, every parameter random, adapters and head ready to train."""
    config = tiny_config(**{"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, **settings})
    model = randomise_(RobertaForSequenceClassification(config), seed)
    mark_only_lora_as_trainable(model)
    return model.eval()


def lora_deberta(seed: int = 0, **settings) -> DebertaV2ForSequenceClassification:
    """The same for DeBERTa."""
    config = tiny_deberta_config(**{"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, **settings})
    model = randomise_(DebertaV2ForSequenceClassification(config), seed)
    mark_only_lora_as_trainable(model)
    return model.eval()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**ragged_batch([17, 3, 30, 9])).logits


def published(path: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    """One flat state dict by torch.save, as the reference implementation's adapters come."""
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    return path


def copied(folder: Path, to: Path, **settings) -> None:
    """Copy an adapter folder, with other settings in its config."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / ADAPTER_CONFIG).write_text(json.dumps(json.loads((folder / ADAPTER_CONFIG).read_text()) | settings))


def refused(path: object, model: nn.Module | None = None, training: bool = False) -> str:
    """The message with which a file is refused; fails unless the model is left alone and the message is short."""
    model = lora_model(seed=1) if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_adapter(model, read_adapter(str(path)), allow_new_head=training)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "a refusal changed the model"
    message = str(error.value)
    assert message.count("\n") < 3 and str(path) in message
    return message


def peft_deberta(seed: int = 0) -> PeftModel:
    """transformers' DeBERTa under PEFT, every parameter random; PEFT leaves the pooler out unless it is named."""
    targets, heads = ["query_proj", "value_proj"], ["classifier", "pooler"]
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=R, lora_alpha=ALPHA, target_modules=targets, modules_to_save=heads
    )
    base = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config())
    return randomise_(get_peft_model(base, settings), seed).eval()


def named(value, names: dict[str, str]):
    """`value` with {query}, {key}, {value} in its strings replaced by the model's names."""
    if isinstance(value, str):
        for name, theirs in names.items():
            value = value.replace("{" + name + "}", theirs)
        return value
    if isinstance(value, dict):
        return {named(key, names): named(v, names) for key, v in value.items()}
    return [named(v, names) for v in value] if isinstance(value, list) else value


@torch.no_grad()
def train_at_random_(model: nn.Module) -> None:
    """Give every parameter that trains other values; the rest stays."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def variant(**settings) -> dict:
    """Settings of a PEFT adapter of a tiny RoBERTa."""
    return {"r": R, "lora_alpha": ALPHA, "target_modules": ["query", "value"]} | settings


def on(folder: Path, **settings) -> DebertaV2ForSequenceClassification:
    """Our classifier with the weights of a checkpoint folder."""
    config = transformers.AutoConfig.from_pretrained(folder, **{"num_labels": 3, **settings})
    return DebertaV2ForSequenceClassification.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
