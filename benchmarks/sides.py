"""The models that are compared, ours and the peer, with random weights, and a step of each."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import XXLARGE
from torch import Tensor
from transformers import DebertaV2Config, RobertaConfig

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
VOCABULARY = {"vocab_size": ROBERTA["vocab_size"]}  # rows that no batch names would only fill memory
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
DEBERTA_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "conv_kernel_size": 0}
MODELS: dict[str, tuple[type, dict]] = {
    "roberta-base": (RobertaConfig, ROBERTA),
    "deberta-base": (DebertaV2Config, XXLARGE | VOCABULARY | DEBERTA_BASE | {"num_hidden_layers": 12}),
    "roberta-large": (RobertaConfig, ROBERTA | LARGE),
    "deberta-xxlarge-3-layers": (DebertaV2Config, XXLARGE | VOCABULARY | {"num_hidden_layers": 3}),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
MODELS |= {f"tiny-{name}": (kind, settings | SMALL) for name, (kind, settings) in MODELS.items()}
LORA_R, LORA_ALPHA, LABELS, LEARNING_RATE = 8, 16, 2, 1e-5


def configure(name: str, layers: int | None = None, **sizes: int) -> Any:
    kind, settings = MODELS[name]
    config = kind(**settings | sizes, num_labels=LABELS)
    if layers:
        config.num_hidden_layers = layers
    return config


def build_peer(config: Any, kind: str = "LoraConfig", **settings: Any) -> torch.nn.Module:
    """transformers' own class with PEFT around it, as their documentation has it: LoRA, or another config of PEFT's."""
    import peft
    from transformers import DebertaV2ForSequenceClassification, RobertaForSequenceClassification

    is_roberta = isinstance(config, RobertaConfig)
    model = (RobertaForSequenceClassification if is_roberta else DebertaV2ForSequenceClassification)(config)
    targets = ["query", "value"] if is_roberta else ["query_proj", "value_proj"]
    head = None if is_roberta else ["classifier", "pooler"]  # what ours trains too
    settings = {"target_modules": targets, "modules_to_save": head} | (
        settings or {"r": LORA_R, "lora_alpha": LORA_ALPHA}
    )
    return peft.get_peft_model(model, getattr(peft, kind)(task_type="SEQ_CLS", **settings))


def build_ours(config: Any, **settings: Any) -> torch.nn.Module:
    """LoRA, or what these attributes of the config choose."""
    from lora_nlu.methods.marking import mark_only_lora_as_trainable
    from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
    from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

    config.update({"apply_lora": True} | (settings or {"lora_r": LORA_R, "lora_alpha": LORA_ALPHA}))
    is_roberta = isinstance(config, RobertaConfig)
    model = (RobertaForSequenceClassification if is_roberta else DebertaV2ForSequenceClassification)(config)
    mark_only_lora_as_trainable(model)
    return model


@contextmanager
def base_file(model: Any) -> Iterator[None]:
    """Let the model have been loaded from a file: weights are replaced only where a file could give them back."""
    with TemporaryDirectory() as folder:
        Path(folder, "model.safetensors").touch()
        model.name_or_path = folder
        yield


def hold_in_bf16(model: Any) -> None:
    """What the trainer does with --bf16 on a CPU."""
    with base_file(model):
        if not model.hold_in_bf16(trains=True):
            raise SystemExit("No weight of this model can be held in bf16.")


def make_batch(lengths: list[int], padded: int, seed: int, pad: int, vocabulary: int = 50000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = padded or max(lengths)
    ids = torch.randint(4, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    labels = torch.randint(LABELS, (len(lengths),), generator=generator)
    return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long(), "labels": labels}


def new_side(name: str, config: Any) -> tuple[torch.nn.Module, torch.dtype | None]:
    """The model of a side and the dtype of its autocast, None for none.

    name: ours, peer, or these with `-bf16`: ours then holds its weights in bf16, the peer runs under autocast.
    """
    side, _, precision = name.partition("-")
    model = build_peer(config) if side == "peer" else build_ours(config)
    if side == "ours" and precision:
        hold_in_bf16(model)
    return model, torch.bfloat16 if side == "peer" and precision else None


class Side:
    """A model and its optimizer; the step is what transformers' Trainer does with both."""

    def __init__(self, model: torch.nn.Module, pad: int) -> None:
        self.model, self.pad = model, pad
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.groups(), lr=LEARNING_RATE, fused=True)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return [{"params": self.trained}]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss

    def after_step(self) -> None:
        """What a method does after an optimizer step, while the gradients are still there."""

    def train(self, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> None:
        self.model.train()
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()

    def evaluate(self, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> None:
        self.model.eval()
        device = batch["input_ids"].device.type
        with torch.no_grad(), torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            self.model(**batch).logits.sum().item()
