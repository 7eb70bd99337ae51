"""The encoders of docs/encoders.md: equal to transformers' own class of each, loaded and saved under its own type."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_close, assert_same_deberta_gradients, assert_same_gradients, ragged_batch, randomise_
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedConfig

from lora_nlu.errors import UserError
from lora_nlu.methods.description import set_method
from lora_nlu.models.loading import MODELS, load_config, load_model, longest_input

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# Type, and settings as in the config.json of the encoder's name, at a smaller size
OF_ROBERTA = {
    "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 42, "num_hidden_layers": 2,
}  # fmt: skip
OF_V3 = {
    "type_vocab_size": 0, "pad_token_id": 0, "layer_norm_eps": 1e-7, "relative_attention": True, "position_buckets": 8,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "position_biased_input": False,
    "max_position_embeddings": 40, "num_hidden_layers": 2,
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "XLM-RoBERTa": ("xlm-roberta", OF_ROBERTA | {"vocab_size": 90}),
    "CamemBERT": ("camembert", OF_ROBERTA | {"vocab_size": 55}),
    "DistilRoBERTa": ("roberta", OF_ROBERTA | {"vocab_size": 60, "num_hidden_layers": 6}),
    "BERTweet": ("roberta", OF_ROBERTA | {"vocab_size": 70, "max_position_embeddings": 18}),
    "mDeBERTa": ("deberta-v2", OF_V3 | {"vocab_size": 90}),
}
CLASSES = {
    "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "deberta-v2": "DebertaV2",
}  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    model_type, settings = ENCODERS[name]
    return getattr(transformers, f"{CLASSES[model_type]}Config")(**SHAPE | settings)


def theirs_of(name: str, head: str = "ForSequenceClassification") -> Any:
    config = config_of(name)
    return randomise_(getattr(transformers, f"{CLASSES[config.model_type]}{head}")(config))


def batch_of(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    return ragged_batch([9, 4, 6, 4, 1], vocab_size=config.vocab_size, pad=config.pad_token_id)


def test_every_supported_type_is_compared():
    assert {*MODELS} == {*CLASSES} == {model_type for model_type, _ in ENCODERS.values()}
    for model_type, name in CLASSES.items():
        assert MODELS[model_type].__name__ == f"{name}ForSequenceClassification"


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_loss_and_gradients_are_those_of_transformers_class(name):
    theirs = theirs_of(name).train()
    config = config_of(name)
    ours = MODELS[config.model_type](config).train()
    ours.load_state_dict(theirs.state_dict())
    labels = torch.tensor([0, 2, 1, 1, 0])
    got, want = (model(**batch_of(config), labels=labels) for model in (ours, theirs))
    assert_close(got.logits, want.logits)
    assert_close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    (assert_same_deberta_gradients if name == "mDeBERTa" else assert_same_gradients)(ours, theirs)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_pretrained_checkpoint_is_loaded_and_saved_for_transformers_class_of_its_type(name, tmp_path):
    """From a masked-language model, as the Hub has them; a head is added, and all of it is saved."""
    theirs_of(name, "ForMaskedLM").save_pretrained(tmp_path / "base")
    config = load_config(str(tmp_path / "base"))
    set_method(config, {"apply_lora": True, "lora_r": 4, "lora_alpha": 8.0})
    config.num_labels = 3
    torch.manual_seed(0)
    model, notes = load_model(str(tmp_path / "base"), config, needs_head=False)
    assert notes == [] and any("lora_A" in key for key, _ in model.named_parameters())
    assert longest_input(config) == (math.inf if name == "mDeBERTa" else config.max_position_embeddings - 2)
    set_method(config, {})
    plain, _ = load_model(str(tmp_path / "base"), config, needs_head=False)
    plain.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert type(again).__name__ == f"{CLASSES[config.model_type]}ForSequenceClassification"
    assert again.config.architectures == [type(again).__name__] and again.config.model_type == config.model_type
    assert_close(plain.eval()(**batch_of(config)).logits, again(**batch_of(config)).logits)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Electra", "Deberta", "XLMRobertaXL"])
def test_other_types_are_refused_with_those_that_work_and_the_page_on_others(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path))
    message = str(error.value)
    assert f"a {config.model_type!r} model; supported: {', '.join(MODELS)}." in message and "encoders.md" in message


def test_the_pages_python_writes_a_bert_as_a_roberta_with_the_same_hidden_states(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sees", "a", "dog"]
    bert = BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=2, max_position_embeddings=20, **SHAPE))
    randomise_(bert).save_pretrained(tmp_path / "bert-base-uncased")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "encoders.md").read_text(), re.M | re.S)
    exec(code, {})
    config = load_config("bert-as-roberta")
    model, _ = load_model("bert-as-roberta", config, needs_head=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert-as-roberta")
    batch = tokenizer(["the cat", "a dog sees the cat"], ["a dog", "the"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist()[0][:3] == [2, 5, 6] and batch["token_type_ids"].any()
    got, want = (m.eval()(**batch).last_hidden_state for m in (model.roberta, bert))
    real = batch["attention_mask"].bool()
    assert_close(got[real], want[real])
    assert longest_input(config) == 20


def test_the_page_lists_every_type():
    page = (ROOT / "docs" / "encoders.md").read_text()
    assert all(f"`{model_type}`" in page for model_type in MODELS)
