"""What of a base model's config reaches a task: each field is taken from the base, set by the task, or of no effect."""

import errno
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ragged_batch, randomise_, tiny_config, tiny_deberta_config
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, RobertaConfig, RobertaForMaskedLM, set_seed

from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UserError
from lora_nlu.labels import set_labels
from lora_nlu.methods.description import set_method
from lora_nlu.models.loading import load_config, load_model, set_task, set_two_views
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.models.tokenizer import load_tokenizer

LABELS = ("entailment", "not_entailment")
PROPERTIES = {"num_labels", "output_attentions"}  # of all configs, and no fields of the dataclass

# Field: another value than a clean checkpoint's. The three groups are a decision: where a new field of transformers
# belongs must be thought about.
TASK: dict[str, Any] = {  # the task, its flags and load_model set them
    "problem_type": "multi_label_classification",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2", "3": "LABEL_3"},
    "label2id": {"a": 3, "b": 7},
    "num_labels": 7,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "dtype": "float16",
    "finetuning_task": "mnli",
    "classifier_dropout": 0.9,
    "cls_dropout": 0.9,
    "reg_loss_wgt": 5.0,
    "masking_prob": 0.5,
    "unk_token_id": 7,
    "special_token_ids": [8, 9],
    "apply_lora": False,
    "lora_r": 3,
    "lora_alpha": 99.0,
    "lora_target_modules": ["key"],
    "lora_layers": [0],
    "lora_dropout": 0.9,
    "apply_bitfit": True,
    "apply_adapter": True,
    "adapter_type": "houlsby",
    "adapter_size": 4,
    "head_only": True,
}
WITHOUT_EFFECT: dict[str, Any] = {
    "transformers_version": "4.4.2",
    "architectures": ["RobertaForTokenClassification"],
    "chunk_size_feed_forward": 2,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "bos_token_id": 9,
    "eos_token_id": 9,
    "use_cache": False,
    "legacy": False,  # of DeBERTa's masked-language head
    # no fields, but in files that people have
    "torchscript": True,
    "gradient_checkpointing": True,
    "max_length": 20,
    "num_beams": 4,
    "attn_implementation": "eager",
    "_attn_implementation": "flash_attention_2",
    "keys_to_ignore_at_inference": ["logits"],
}
BASE: dict[str, Any] = {  # the architecture, and how the base was trained: its dropouts, its initial weights
    "vocab_size": 49,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.3,
    "max_position_embeddings": 39,
    "type_vocab_size": 3,
    "initializer_range": 0.1,
    "layer_norm_eps": 1e-2,
    "pad_token_id": 2,
}
OF_BASE: dict[str, dict[str, Any]] = {
    "roberta": BASE | {"is_decoder": True, "add_cross_attention": True, "position_embedding_type": "relative_key"},
    "deberta-v2": {name: value for name, value in BASE.items() if name != "pad_token_id"}
    | {
        "max_position_embeddings": 99,
        "relative_attention": False,
        "max_relative_positions": 3,
        "position_biased_input": True,
        "pos_att_type": ["p2c"],
        "pooler_dropout": 0.5,
        "pooler_hidden_act": "relu",
        "pooler_hidden_size": 16,
        "position_buckets": 6,
        "norm_rel_ebd": "none",
        "share_att_key": False,
        "conv_kernel_size": 0,
        "conv_act": "relu",
        "conv_groups": 2,
        "embedding_size": 16,
        "attention_head_size": 4,
        "z_steps": 2,
    },
}
NO_EFFECT = {  # RoBERTa counts positions from the padding token
    "roberta": WITHOUT_EFFECT,
    "deberta-v2": WITHOUT_EFFECT | {"pad_token_id": 2},
}
CLASSES: dict[str, Any] = {
    "roberta": (RobertaConfig, tiny_config, RobertaForMaskedLM),
    "deberta-v2": (DebertaV2Config, tiny_deberta_config, DebertaV2ForMaskedLM),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A clean base of each kind: encoder and masked-language head, with dropout."""
    folders = {}
    for kind, (_, config, model) in CLASSES.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        settings = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "num_labels": 2}
        randomise_(model(config(**settings))).save_pretrained(folders[kind])
    return folders


def changed(checkpoint: Path, folder: Path, **settings: Any) -> Path:
    """The same base with other settings in its config.json."""
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def built(folder: Path, labels: tuple[str, ...] = LABELS) -> tuple[Any, list[torch.Tensor]]:
    """The config of the model that a task makes of a base, and all that the model computes and contains."""
    config = load_config(str(folder))
    set_task(config, "rte", labels, None)
    set_method(config, {"apply_lora": True, "lora_r": 2, "lora_alpha": 4.0})
    set_seed(0)
    model, _ = load_model(str(folder), config, needs_head=False)
    set_two_views(model, None, 0.0, 0.0)
    batch = ragged_batch([3, 9, 12], vocab_size=49) | {"labels": torch.tensor([0, 1, 1] if labels else [0.5, 2, 3])}
    trained = model.train()(**batch)
    predicted = model.eval()(**batch)
    assert [*trained] == [*predicted] == ["loss", "logits"]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return model.config, [
        *trained.values(),
        *predicted.values(),
        *model.state_dict().values(),
        torch.tensor(len(names)),
    ]


@pytest.fixture(scope="module")
def clean(checkpoints) -> dict[str, Any]:
    return {kind: built(folder) for kind, folder in checkpoints.items()}


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_the_pinned_configs_is_classified_once(kind):
    groups = [TASK, NO_EFFECT[kind], OF_BASE[kind]]
    listed = [name for group in groups for name in group]
    assert len(listed) == len(set(listed))
    assert {field.name for field in fields(CLASSES[kind][0])} | PROPERTIES <= set(listed)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in CLASSES for name in {**TASK, **NO_EFFECT[kind]}])
def test_a_field_that_the_task_sets_or_that_has_no_effect_changes_no_bit_of_the_model(
    checkpoints, clean, tmp_path, kind, name
):
    value = {**TASK, **NO_EFFECT[kind]}[name]
    config, tensors = built(changed(checkpoints[kind], tmp_path, **{name: value}))
    assert same(tensors, clean[kind][1])
    if name in TASK:
        assert getattr(config, name, None) == getattr(clean[kind][0], name, None)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in CLASSES for name in OF_BASE[kind]])
def test_a_field_of_the_architecture_is_the_bases_or_is_refused(checkpoints, clean, tmp_path, kind, name):
    folder = changed(checkpoints[kind], tmp_path, **{name: OF_BASE[kind][name]})
    try:
        _, tensors = built(folder)
    except UserError as e:
        assert str(folder) in str(e)
    else:
        assert not same(tensors, clean[kind][1])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_regression_is_one_whatever_the_base_was_trained_for(checkpoints, tmp_path, kind, problem):
    settings = {"problem_type": problem, "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    config, tensors = built(changed(checkpoints[kind], tmp_path, **settings), labels=())
    assert same(tensors, built(checkpoints[kind], labels=())[1])
    assert (config.num_labels, config.problem_type, config.id2label) == (1, "regression", {0: "LABEL_0"})


def test_all_labels_are_written_where_the_count_stays_and_the_names_change():
    config = tiny_config(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, problem_type="regression")
    set_labels(config, LABELS)
    assert config.id2label == dict(enumerate(LABELS)) and config.label2id == {name: i for i, name in enumerate(LABELS)}
    assert config.problem_type == "single_label_classification"


def test_too_little_memory_is_not_called_damage_of_a_base_or_an_adapter(checkpoints, tmp_path, monkeypatch):
    """A disk that fails is not, either."""
    name = str(checkpoints["roberta"])
    torch.save({"a.lora_A": torch.ones(1, 2)}, tmp_path / "a.bin")
    no_memory = "there is not enough memory"
    for error, expected_message in (
        (MemoryError("Cannot allocate memory (os error 12)"), no_memory),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"), no_memory),
        (RuntimeError("unable to mmap 240000088 bytes from file </a>: Cannot allocate memory (12)"), no_memory),
        (OSError(errno.EIO, "Input/output error"), "can't be read"),
    ):

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", fail)
            with pytest.raises(UserError, match=expected_message) as raised:
                read_adapter(str(tmp_path / "a.bin"))
        assert "damaged" not in str(raised.value)
        with monkeypatch.context() as patched:
            patched.setattr(RobertaForSequenceClassification, "from_pretrained", fail)
            with pytest.raises(UserError, match=expected_message.replace("be read", "be loaded")):
                load_model(name, load_config(name), False)


@pytest.mark.parametrize(
    ("file", "content", "expected_message"),
    [
        ("tokenizer.json", '{"error": "Repository not found"}', "that can be read (KeyError: 'added_tokens')"),
        ("tokenizer.json", "[]", "that can be read"),
        ("spm.model", "", "spm.model: damaged or cut short: it is empty"),
        ("spm.model", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "no tokens but a Git LFS pointer"),
        ("spm.model", "<!doctype html><title>404</title>", "no tokens but a web page"),
    ],
)
def test_a_tokenizer_that_is_no_tokenizer_is_refused_in_one_message(tmp_path, file, content, expected_message):
    DebertaV2Config(vocab_size=99).save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as raised:
        load_tokenizer(str(tmp_path), load_config(str(tmp_path)))
    assert (
        expected_message in str(raised.value)
        and str(tmp_path) in str(raised.value)
        and "tiktoken" not in str(raised.value)
    )
