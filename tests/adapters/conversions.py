"""Small models with their base and adapter in files, and the program that converts and inspects them."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from helpers import CLASSIFIERS, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.methods.marking import mark_only_lora_as_trainable, mark_trainable
from lora_nlu.models.loading import base_fingerprint

R, ALPHA = 4, 6
LABELS = ["yes", "no", "perhaps"]
CONFIGS = {"roberta": tiny_config, "deberta": tiny_deberta_config}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**ragged_batch([17, 3, 30, 9], pad=model.config.pad_token_id)).logits


def write_tokenizer(folder: Path) -> Path:
    """Two words, a and b."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "b"])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def written(kind: str, tmp_path: Path, reading: bool, **settings: int) -> tuple[nn.Module, Path, Path]:
    lora = {"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, "lora_relative_query": reading}
    config = CONFIGS[kind](**lora, **settings)
    model = randomise_(CLASSIFIERS[config.model_type][0](config))
    mark_only_lora_as_trainable(model)
    base = CLASSIFIERS[config.model_type][1](CONFIGS[kind](**settings))
    base.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    metadata = {
        "task": "mnli", "labels": LABELS, "base_model": str(tmp_path / "base"),
        "base_fingerprint": base_fingerprint(model), "metrics": {"eval_accuracy": 0.875},
    }  # fmt: skip
    save_adapter(model, tmp_path / "adapter", metadata)
    return model, tmp_path / "base", tmp_path / "adapter"


def run_program(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([*map(str, argv)])
    return code, *capsys.readouterr()


def table(out: str) -> dict[str, str]:
    """What inspect printed, by the first column."""
    return {name: value.strip() for name, value in (line.strip().split("  ", 1) for line in out.splitlines())}


def inspected(capsys, source: Path) -> dict[str, str]:
    code, out, err = run_program(capsys, "inspect", source)
    assert code == 0, err
    return table(out)


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
OTHERS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, ["query", "value"]),
    "deberta": (transformers.DebertaForSequenceClassification, transformers.DebertaConfig, ["in_proj"]),
    "model": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, ["q_proj", "v_proj"]),
    "encoder": (transformers.DebertaModel, transformers.DebertaConfig, ["in_proj"]),
}


def anonymous(adapter: Path, to: Path) -> Path:
    """A copy of an adapter folder as PEFT writes it: with no word of a run."""
    shutil.copytree(adapter, to)
    (to / "run_metadata.json").unlink()
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    return to


def trained_by(folder: Path, kind: str = "roberta", **settings: object) -> tuple[nn.Module, Path]:
    """A model with a method's part at random, and the folder it was saved in."""
    config = CONFIGS[kind](**settings)
    model = randomise_(CLASSIFIERS[config.model_type][0](config))
    mark_trainable(model)
    save_adapter(model, folder, {"base_model": "someone/a-base"})
    return model, folder
